"""Models behind HTTP, with the routes of text-embeddings-inference, OpenAI and Cohere."""
