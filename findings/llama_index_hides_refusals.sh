#!/usr/bin/env bash
# LlamaIndex's TextEmbeddingsInference, and a server of text-embeddings-inference that refuses.
#
# Expected: an error that says what the server said, 429 "Model is overloaded" for instance, so that it can be tried again.
# Seen with llama-index-embeddings-text-embeddings-inference 0.6.0 (llama-index-core 0.14.25): the status is not looked at,
# and the error's JSON is read as vectors: one text gives KeyError: 0, and a batch pydantic's ValidationError of an event.
# Neither names the status or holds it, so that code that tries again after 429 does not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-index-embeddings-text-embeddings-inference==0.6.0 \
  llama-index-core==0.14.25
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import http.server
import json
import threading

from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"error": "Model is overloaded", "error_type": "Overloaded"}).encode()
        self.send_response(429)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
embedder = TextEmbeddingsInference("any", base_url=f"http://127.0.0.1:{server.server_port}")
try:
    one = embedder.get_text_embedding("a text")
except Exception as error:
    one = error
print("one text:", repr(one))
assert isinstance(one, KeyError), "the refusal of one text is read otherwise"
try:
    two = embedder.get_text_embedding_batch(["a text", "another one"])
except Exception as error:
    two = error
print("two texts:", repr(two)[:200])
assert type(two).__name__ == "ValidationError", "the refusal of a batch is read otherwise"
for found in (one, two):
    assert "429" not in repr(found) and not hasattr(found, "response"), "the error knows the status"

PYTHON
echo "still so: errors do not say that the server refused"
