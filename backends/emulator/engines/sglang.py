"""SGLang: `base:adapter`, flat errors, an unknown model answered from the base, unloaded adapters that come back,
and adapters of another base that are taken and then end the server.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec

from backends.emulator.adapters import Adapter, AdapterFault, Directory
from backends.emulator.answers import Format, Usage
from backends.emulator.ask import Ask, Prompt, chat_prompt
from backends.emulator.engines.base import Answer, Death, Engine, Handler, Refusal, Request, last_part
from backends.emulator.language import count_tokens, detokenize, score, tokenize
from backends.emulator.recordings import Reply, json_reply
from backends.emulator.writer import Writer

_TOKENIZER_CONTEXT_TOKENS = 8192  # what its /tokenize says, whatever --context-length is
_COMPLETION_TOKENS = 16
_DYING_S = 0.2  # the real one took five seconds to go


class SglangFormat(Format):
    """SGLang's additions: `matched_stop`, weight versions, `response_token_ids`."""

    def finish(self, choice: dict[str, Any], writer: Writer) -> None:
        choice["matched_stop"] = writer.stop

    def add_ids(self, choice: dict[str, Any], ids: list[int]) -> None:
        choice["response_token_ids" if "message" in choice else "token_ids"] = ids

    def add_prompt_ids(self, body: dict[str, Any], kind: str, prompts: list[Prompt]) -> None:
        if kind == "stream":
            return
        share = len(body["choices"]) // len(prompts)
        for index, choice in enumerate(body["choices"]):
            answered = choice.pop("response_token_ids", None)
            choice["prompt_token_ids"] = prompts[index // share].token_ids
            if answered is not None:
                choice["response_token_ids"] = answered

    def add_totals(self, body: dict[str, Any], usage: Usage) -> None:
        for version in body["metadata"]["weight_versions"]:
            version["end"] = usage.completion_tokens

    def text_offset(self, offset: int) -> int:
        return -1

    def shown_model(self, ask: Ask) -> Any:
        return ask.body.get("model", "default")


class Sglang(Engine):
    """The server of `python -m sglang.launch_server`."""

    guards_everything_but = ("/health", "/ready", "/metrics")
    head_with_first_token = True

    def __post_init__(self) -> None:
        super().__post_init__()
        quick = os.environ.get("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "").lower() in ("false", "0")
        self.health_ms = 0 if quick else self.book["models/health"].elapsed_s * 1000

    def make_format(self) -> Format:
        return SglangFormat(self.book, self.settings.served_name)

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("GET", "/health_generate"): self.health,
            ("GET", "/ready"): self.recorded("models/ready"),
            ("GET", "/ping"): self.recorded("models/ping"),
            ("GET", "/model_info"): self.recorded("models/model_info"),
            ("GET", "/get_model_info"): self.recorded("models/model_info"),
            ("GET", "/server_info"): self.recorded("admin/server_info"),
            ("GET", "/get_server_info"): self.recorded("admin/server_info"),
            ("GET", "/v1/loads"): self.loads,
            ("GET", "/flush_cache"): self.recorded("admin/flush_cache"),
            ("POST", "/flush_cache"): self.recorded("admin/flush_cache"),
            ("POST", "/abort_request"): self.recorded("admin/abort_request"),
            ("POST", "/invocations"): self.chat,
            ("GET", "/v1/models/{name}"): self.model,
            ("POST", "/generate"): self.score,
            ("POST", "/tokenize"): self.tokenize,
            ("POST", "/v1/tokenize"): self.tokenize,
            ("POST", "/detokenize"): self.detokenize,
            ("POST", "/v1/detokenize"): self.detokenize,
            ("POST", "/load_lora_adapter"): self.load,
            ("POST", "/unload_lora_adapter"): self.unload,
        }

    async def chat(self, request: Request) -> Answer:
        return self._generate(request, "chat")

    async def completion(self, request: Request) -> Answer:
        return self._generate(request, "completion")

    def _generate(self, request: Request, kind: str) -> Answer:
        if self.settings.embeddings:
            return Death(_DYING_S)  # as recorded: a server of embeddings does not survive a chat
        generation = self.generation(request, kind)
        adapter = self.adapters.listed.get(generation.ask.adapter or "")
        return generation if adapter is None or adapter.fits else Death(_DYING_S)

    def default_limit(self, ask: Ask) -> int | None:
        return _COMPLETION_TOKENS if ask.kind == "completion" else None

    def resolve(self, ask: Ask) -> None:
        ask.keeps_seed = self.settings.seeds
        _, colon, name = str(ask.model or "").partition(":")
        name = name if colon else ask.get("lora_path", "")
        if not name:
            return  # any other model is answered from the base
        if not self.settings.lora:
            raise Refusal(self.book.reply("lora_off/chat_without_lora", {"good": name}))
        adapter = self.adapters.use(name) or self._reloaded(name)
        if adapter is None:
            known = {"dict_keys([])": f"dict_keys({list(self.adapters.listed)})"}
            raise Refusal(self.book.reply("errors/colon_model", {"nope": name, **known}))
        ask.adapter, ask.weights = adapter.name, adapter.weights

    def _reloaded(self, name: str) -> Adapter | None:
        """An adapter that was unloaded or evicted comes back by being asked for."""
        if name in self.adapters.known_paths:
            self.load_static(name, self.adapters.known_paths[name])
        return self.adapters.listed.get(name)

    async def score(self, request: Request) -> Answer:
        """The native route, as far as it gives the logprobs of a prompt of ids."""
        body = self.decoded(request)
        ids: list[int] = body["input_ids"]
        ask = Ask("completion", body, None)
        self.resolve(ask)
        scored = zip([None, *score(ask.weights, ids)], ids, strict=True)
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": [[logprob, id, None] for logprob, id in scored]}
        return json_reply(200, {"text": "", "output_ids": [], "meta_info": meta})

    # ---- information

    async def model(self, request: Request) -> Answer:
        """One model; adapters are listed and yet not found here."""
        name = last_part(request.path)
        if name == self.settings.served_name:
            return json_reply(200, self.model_cards()[0])
        return self.book.reply("models/retrieve_unknown", {"nope": name})

    async def loads(self, request: Request) -> Answer:
        """How busy it is."""
        body = self.book["models/loads"].json_copy()
        body["loads"][0] |= {"num_running_reqs": self.batch.running, "num_waiting_reqs": self.batch.waiting}
        return json_reply(200, body)

    async def tokenize(self, request: Request) -> Answer:
        """Ids of a prompt or of a conversation, for any model."""
        body = self.decoded(request)
        text = chat_prompt(body["messages"], False).text if "messages" in body else body.get("prompt", "")
        answer = {"tokens": tokenize(text), "count": count_tokens(text), "max_model_len": _TOKENIZER_CONTEXT_TOKENS}
        return json_reply(200, answer)

    async def detokenize(self, request: Request) -> Answer:
        """Text of ids."""
        return json_reply(200, {"text": detokenize(self.decoded(request)["tokens"])})

    # ---- adapters

    async def load(self, request: Request) -> Answer:
        """Take an adapter under a new name, the base's own included."""
        body = self.decoded(request)
        if not self.settings.lora:
            return self.book.reply("lora_off/load_without_lora")
        name, path = body.get("lora_name"), body.get("lora_path")
        if name is None or path is None:
            return self.book.reply("lora/load_no_name", {"{adapters}/good": path})
        if name in self.adapters.listed:
            return self._listing("lora/load_again", {"good": name})
        await asyncio.sleep(self.script.load_ms / 1000)
        if not request.lied_to:
            try:
                self.load_static(name, path)
            except AdapterFault as fault:
                return self._refused(name, path, fault)
            self.adapters.after_load(name, request.ignored)
        return self._listing("lora/load")

    def load_static(self, name: str, path: str) -> None:
        adapter, directory = self.inspected(name, path)
        self._check(name, directory)
        self.adapters.add(adapter)
        self.adapters.evict_one_over()

    def _check(self, name: str, directory: Directory) -> None:
        if directory.config.get("use_dora"):
            raise AdapterFault("dora")
        if directory.rank > self.settings.max_rank:
            raise AdapterFault("rank_too_high", {"rank64": name, "64": directory.rank})

    def _refused(self, name: str, path: str, fault: AdapterFault) -> Reply:
        if fault.kind == "missing_path" and not path.startswith("/"):
            return self._listing("lora/load_repo_path")
        recorded_path = f"{{adapters}}/{'nowhere' if fault.kind == 'missing_path' else fault.kind}"
        return self._listing(f"lora/load_{fault.kind}", {recorded_path: path, "dora": name, **fault.replace})

    async def unload(self, request: Request) -> Answer:
        """Take a name off the list, until the next request that asks for it."""
        body = self.decoded(request)
        if not self.settings.lora:
            return self.book.reply("lora_off/unload_without_lora")
        name = body.get("lora_name")
        if name is None:
            return self.book.reply("lora/unload_no_name")
        if name not in self.adapters.listed:
            known = f"odict_keys({list(self.adapters.listed)})"
            return self._listing("lora/unload_unknown", {"nope": name, "odict_keys(['modules_to_save'])": known})
        await asyncio.sleep(self.script.unload_ms / 1000)
        if not request.lied_to:
            self.adapters.listed.pop(name, None)
        return self._listing("lora/unload")

    def _listing(self, case: str, replace: dict[str, Any] | None = None) -> Reply:
        """A recorded answer of the adapter routes, with the adapters that are loaded now."""
        body = msgspec.json.decode(self.book.reply(case, replace).body)
        if body["loaded_adapters"] is not None:
            body["loaded_adapters"] = self.adapters.by_age()
        return json_reply(self.book[case].status, body)
