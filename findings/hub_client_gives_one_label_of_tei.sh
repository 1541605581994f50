#!/usr/bin/env bash
# huggingface_hub's InferenceClient.text_classification, asked of a server of text-embeddings-inference.
#
# Expected: a list of labels with their scores, as its type says and as the hub itself gives. The client takes the URL of a
# server, and text-embeddings-inference names POST / as the route for such clients.
# Seen with huggingface_hub 2.4.0: one element, the best label, not in a list: the client takes the first of the answer,
# which is the text's list where the hub answers, [[...]], and the first label where text-embeddings-inference 1.9.3
# answers one text, [...], by its published OpenAPI. Whoever loops over the result gets an error, or the element's fields.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import http.server
import json
import threading

from huggingface_hub import InferenceClient

LABELS = [{"score": 0.75, "label": "positive"}, {"score": 0.25, "label": "negative"}]
answer = None


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(f"http://127.0.0.1:{server.server_port}")
answer = [LABELS]
as_hub = client.text_classification("a fine film")
answer = LABELS
as_tei = client.text_classification("a fine film")
print("hub:", as_hub, "text-embeddings-inference:", as_tei)
assert isinstance(as_hub, list) and [each.label for each in as_hub] == ["positive", "negative"]
assert not isinstance(as_tei, list), "the client gives all labels of text-embeddings-inference"
assert as_tei.label == "positive"
PYTHON
echo "still so: of a server of text-embeddings-inference the client gives one label, not a list"
