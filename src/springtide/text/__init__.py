"""What lies between messages and tokens: tokenizers, chat templates, text that comes out token by token.

Knows nothing of models, devices or sockets, and imports only `core`.
"""
