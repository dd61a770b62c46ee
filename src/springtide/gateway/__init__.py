"""The public edge: wire formats, keys, admission, dispatch, metering. Knows no tokenizer and no engine."""
