"""A gateway small enough to run in a test, that really samples: the published adapter on the model, by transformers."""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections import Counter
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class LiveGateway:
    """Speaks what the trainer's sampler asks for. `published` and `deleted` tell what was asked."""

    def __init__(self, model: Path, work: Path) -> None:
        self._model, self._work = model, work
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._loaded: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(model).eval()}
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self.published: list[str] = []
        self.deleted: list[str] = []
        self.used: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.refuse_next = 0  # requests to answer with 503
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def load(self, name: str, archive: bytes) -> dict[str, Any]:
        version = len(self.published) + 1
        pinned = f"{name}@v{version}"
        directory = self._work / pinned
        zipfile.ZipFile(io.BytesIO(archive)).extractall(directory)
        base = AutoModelForCausalLM.from_pretrained(self._model)
        self._loaded[pinned] = PeftModel.from_pretrained(base, directory).eval()
        self.published.append(pinned)
        return {"name": name, "version": version, "state": "ready", "reason": ""}

    def delete(self, name: str) -> bool:
        self.deleted.append(name)
        return self._loaded.pop(name, None) is not None

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            model = self._loaded[body["model"]]
            self.used.append(body["model"])
            self.asked.append(body)
            # By what is asked, not by when it arrives: the client's threads come in any order.
            asked = json.dumps([body["model"], body["messages"]])
            self._seen[asked] += 1
            generator = torch.Generator().manual_seed(crc32(f"{asked} {self._seen[asked]}".encode()))
            ids = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )["input_ids"]
            sampled, logprobs = [], []
            for _ in range(body["max_tokens"]):
                row = model(input_ids=torch.cat([ids, torch.tensor([sampled], dtype=torch.long)], 1)).logits[0, -1]
                distribution = row.float().log_softmax(-1)
                if body["temperature"]:
                    token = int(torch.multinomial(distribution.exp(), 1, generator=generator))
                else:
                    token = int(distribution.argmax())
                sampled.append(token)
                logprobs.append(float(distribution[token]))
                if token == self.tokenizer.eos_token_id:
                    break
        finished = sampled[-1] == self.tokenizer.eos_token_id
        choice = {
            "message": {"role": "assistant", "content": self.tokenizer.decode(sampled, skip_special_tokens=True)},
            "token_ids": sampled,
            "logprobs": {"content": [{"token": "", "logprob": logprob} for logprob in logprobs]},
            "finish_reason": "stop" if finished else "length",
        }
        return {"choices": [choice], "prompt_token_ids": ids[0].tolist()}


def _handler(gateway: LiveGateway) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, body: dict[str, Any], *headers: tuple[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for header in (("content-length", str(len(data))), *headers):
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "base"}, {"id": "other", "parent": "base"}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if gateway.refuse_next > 0:  # requests come side by side: it may fall below
                gateway.refuse_next -= 1
                self.reply(503, {"error": {"message": "busy"}}, ("retry-after-ms", "1"))
            elif self.path == "/v1/adapters":
                head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
                parts = BytesParser().parsebytes(head + body).get_payload()
                fields = {
                    re.search(r'name="(\w+)"', part["content-disposition"])[1]: part.get_payload(decode=True)
                    for part in parts
                }
                self.reply(201, gateway.load(fields["name"].decode(), fields["file"]))
            else:
                self.reply(200, gateway.answer(json.loads(body)))

        def do_DELETE(self) -> None:
            found = gateway.delete(self.path.rpartition("/")[2].replace("%40", "@"))
            self.reply(200 if found else 404, {"error": {"message": "no such adapter"}})

    return Handler
