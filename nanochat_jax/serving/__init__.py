"""A model behind OpenAI's HTTP interface: what a request asks for, one engine for all of them, and a page to talk."""
