"""The OpenAI protocol over HTTP: the models of an engine, for programs that speak it."""
