"""An OpenAI-compatible server on the loopback that serves a tiny model, and fails as it is told to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from grkd_trl.teacher import LocalTeacher


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, body, self.headers.get("Authorization")))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):  # a client that did not wait
            self.close_connection = True
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, body, fault):
        if fault == "stall":
            self.server.stop.wait(1.0)
        if isinstance(fault, tuple):
            status, headers = fault
            message = json.dumps({"error": {"message": f"told to fail, {self.headers.get('Authorization')}"}})
            return self.send(status, message.encode(), headers)
        with self.server.lock:  # one model, one thread
            answer = self.server.completions(body) if self.path == "/v1/completions" else self.server.chat(body)
        time.sleep(self.server.delay)
        answer["model"] = body["model"]
        if callable(fault):
            fault(answer)
        if fault == "missing":
            answer["choices"][0] |= {"prompt_logprobs": None, "logprobs": None}
        if fault == "other tokens":
            answer["choices"][0]["prompt_logprobs"].pop()
        content = json.dumps(answer).encode()
        if fault == "malformed":
            content = content[: len(content) // 2]
        self.send(200, content, {}, cut=fault == "cut")

    def send(self, status, content, headers, cut=False):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.lock, self.stop = threading.RLock(), threading.Event()
        self.reset()

    def reset(self, *faults, delay=0.0):
        self.faults, self.requests, self.under_way, self.most_under_way = list(faults), [], 0, 0
        self.delay = delay

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @torch.no_grad()
    def logps(self, ids):
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()

    def completions(self, body):
        if isinstance(body["prompt"], str):
            return self.write(body, body["prompt"], lambda text: {"text": text})
        ids = body["prompt"]
        tokens = [self.tokenizer.decode([token]) for token in ids]
        choice = {"index": 0, "text": " x", "finish_reason": "length", "logprobs": None}
        if "prompt_logprobs" in body:  # vLLM: for each token but the first a map from ids, keys being strings in JSON
            entries = [
                {str(token): {"logprob": logp, "rank": 1, "decoded_token": text}}
                for token, logp, text in zip(ids[1:], self.logps(ids), tokens[1:], strict=True)
            ]
            choice |= {"prompt_logprobs": [None, *entries], "prompt_token_ids": ids}
        elif body.get("echo") and body.get("logprobs"):  # SGLang: the prompt's tokens, then what was written
            token_logprobs = [None, *self.logps(ids), -1.5]
            choice["logprobs"] = {
                "text_offset": [-1] * len(token_logprobs),
                "token_logprobs": token_logprobs,
                "tokens": [*tokens, "x"],
                "top_logprobs": [None, *({token: -0.1} for token in tokens)],
            }
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return {"object": "text_completion", "choices": [choice], "usage": usage}

    def chat(self, body):
        return self.write(body, body["messages"], lambda text: {"message": {"role": "assistant", "content": text}})

    def write(self, body, prompt, shape):
        (texts,), (clipped,), *_ = LocalTeacher(self.model, self.tokenizer).generate(
            [prompt],
            body["n"],
            seed=body["seed"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
        )
        choices = [
            {"index": index, "finish_reason": "length" if cut else "stop", "logprobs": None, **shape(text)}
            for index, (text, cut) in enumerate(zip(texts, clipped, strict=True))
        ]
        return {"object": "chat.completion", "choices": choices[::-1]}  # their order is not promised


@contextmanager
def serve(model, tokenizer):
    server = Server(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
