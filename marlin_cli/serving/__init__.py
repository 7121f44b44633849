"""A model served over HTTP: OpenAI's paths, raw bytes, metrics and a page to try it. One process, one model, many streams."""
