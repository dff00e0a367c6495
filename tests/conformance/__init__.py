"""The official OpenAI client, unmodified, against the gateway over each emulated engine.

Run it with the client's current major version (in .venv) and the one before (in .venv-openai2): `make conformance`.
"""
