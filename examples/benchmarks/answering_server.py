"""A server of answers that were computed before, in vLLM's format, for `served_labels.py`."""

import json
import multiprocessing
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


spawn = multiprocessing.get_context("spawn")


def answer(teacher, ids, k):
    """What vLLM says of some tokens: at each but the first the log-probability of the token, and the k most likely."""
    with torch.no_grad():
        logps = teacher(input_ids=torch.tensor([ids], device=teacher.device)).logits[0, :-1].float().log_softmax(-1)
    entries = []
    for row, token in zip(logps, ids[1:], strict=True):
        tops = list(zip(*(values.tolist() for values in row.topk(k)), range(1, k + 1), strict=True))
        ranked = [(row[token].item(), token, (row > row[token]).sum().item() + 1), *tops]
        entries.append({str(i): {"logprob": value, "rank": rank, "decoded_token": "?"} for value, i, rank in ranked})
    choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
    choice |= {"prompt_logprobs": [None, *entries], "prompt_token_ids": ids}
    return json.dumps({"model": "teacher", "choices": [choice]}).encode()


def serve(answers, latency, port):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = answers.get(tuple(body["prompt"])) or answers[None]  # of the probe
            time.sleep(latency)
            # In one piece, which the loopback sends at once
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            self.wfile.write(head.encode() + content)

    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


def in_process(function, *given):
    """What a process of its own sends first."""
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=function, args=(*given, sender), daemon=True)
    process.start()
    return receiver.recv(), process
