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

    def do_GET(self):  # health, and the list of models, for TRL's client
        self.send(200, json.dumps({"data": [{"id": "tiny"}]}).encode(), {})

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
            answer = self.server.answers[self.path](body)
        time.sleep(self.server.delay)
        if answer is None:
            k = body["prompt_logprobs"]
            message = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.server.max_logprobs}"
            )
            return self.send(400, json.dumps({"error": {"message": message, "code": 400}}).encode(), {})
        answer |= {"model": body["model"]} if "model" in body else {}
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
        self.answers = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/generate": self.generate,  # SGLang's own
        }
        self.reset()

    def reset(self, *faults, delay=0.0, max_logprobs=20):
        self.max_logprobs = max_logprobs
        self.faults, self.requests, self.under_way, self.most_under_way = list(faults), [], 0, 0
        self.delay = delay

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @torch.no_grad()
    def all_logps(self, ids):
        return self.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)

    def logps(self, ids):
        return self.all_logps(ids)[range(len(ids) - 1), ids[1:]].tolist()

    def tops(self, ids, k):
        """At each position but the first the k most likely tokens, as pairs of an id and its log-probability."""
        logps, tokens = self.all_logps(ids).topk(k)
        return [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), logps.tolist(), strict=True)]

    def completions(self, body):
        if isinstance(body["prompt"], str):
            return self.write(body, body["prompt"], lambda text: {"text": text})
        ids = body["prompt"]
        if isinstance(ids[0], list):  # a batch, as TRL's client sends it
            (*choices,) = (self.completions(body | {"prompt": own})["choices"][0] for own in ids)
            return {"choices": [choice | {"index": index} for index, choice in enumerate(choices)]}
        tokens = [self.tokenizer.decode([token]) for token in ids]
        choice = {"index": 0, "text": " x", "finish_reason": "length", "logprobs": None}
        if "prompt_logprobs" in body:  # vLLM: for each token but the first a map from ids, keys being strings in JSON
            k = body["prompt_logprobs"]
            if k > self.max_logprobs:
                return None
            ranks = (self.all_logps(ids).argsort(-1, descending=True) == torch.tensor(ids[1:])[:, None]).nonzero()[
                :, 1
            ]
            entries = []
            for token, logp, rank, tops in zip(
                ids[1:], self.logps(ids), ranks.tolist(), self.tops(ids, k), strict=True
            ):
                # The token itself first, with its own rank, which is there once if it is one of the k
                ranked = [(token, logp, rank + 1), *((*pair, place) for place, pair in enumerate(tops, start=1))]
                entries.append({str(i): {"logprob": v, "rank": r, "decoded_token": "?"} for i, v, r in ranked})
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

    def generate(self, body):
        ids, k = body["input_ids"], body["top_logprobs_num"]
        tops = [[[logp, token, None] for token, logp in pairs] for pairs in self.tops(ids, k)]
        own = [[logp, token, None] for token, logp in zip(ids, [None, *self.logps(ids)], strict=True)]
        said = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": [None, *tops]}
        return {"text": " x", "output_ids": [1], "meta_info": {"finish_reason": {"type": "length"}, **said}}

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
