"""The nervous system between processes: NATS connection, subjects, request streams, presence, desired state,
leader election, usage records and credentials. Knows nothing of models, HTTP or databases."""
