"""vLLM: adapters under their own names, nested errors, text answers from its adapter routes, /invocations unguarded."""

from __future__ import annotations

import asyncio
from typing import Any

from backends.emulator.adapters import AdapterFault, Directory
from backends.emulator.answers import Format
from backends.emulator.ask import Ask, Prompt, chat_prompt
from backends.emulator.engines.base import Answer, Engine, Generation, Handler, Refusal, Request, last_part
from backends.emulator.language import Token, count_tokens, detokenize, score, tokenize
from backends.emulator.recordings import Reply, json_reply
from backends.emulator.writer import Writer

_COMPLETION_TOKENS = 16


class VllmFormat(Format):
    """vLLM's additions: `stop_reason`, and `token_ids` in each choice."""

    def finish(self, choice: dict[str, Any], writer: Writer) -> None:
        choice["stop_reason"] = writer.stop if isinstance(writer.stop, str) else None

    def add_ids(self, choice: dict[str, Any], ids: list[int]) -> None:
        choice["token_ids"] = ids

    def add_prompt_ids(self, body: dict[str, Any], kind: str, prompts: list[Prompt]) -> None:
        if kind == "completion":
            share = len(body["choices"]) // len(prompts)
            for index, choice in enumerate(body["choices"]):
                choice["prompt_token_ids"] = prompts[index // share].token_ids
        else:
            body["prompt_token_ids"] = prompts[0].token_ids

    def whole(self, ask: Ask, writers: list[Writer], texts: list[str], tokens: list[list[Token]], id: str) -> Reply:
        if allowed := ask.get("allowed_token_ids"):
            logprob = score(ask.weights, [*ask.prompts[0].token_ids, allowed[0]])[-1]
            forced = Token(allowed[0], detokenize(allowed[:1]), logprob)
            texts, tokens = [forced.text], [[forced]]
        return super().whole(ask, writers, texts, tokens, id)

    def shown_model(self, ask: Ask) -> Any:
        return ask.adapter or self.served_name


class Vllm(Engine):
    """The OpenAI server of `vllm serve`."""

    named_call_stops = True
    guards_only = ("/v1", "/v2", "/inference", "/cohere")

    def make_format(self) -> Format:
        return VllmFormat(self.book, self.settings.served_name)

    def routes(self) -> dict[tuple[str, str], Handler]:
        routes: dict[tuple[str, str], Handler] = {
            ("GET", "/ping"): self.recorded("models/ping"),
            ("POST", "/ping"): self.recorded("models/ping"),
            ("GET", "/version"): self.recorded("models/version"),
            ("GET", "/load"): self.recorded("models/load"),
            ("POST", "/tokenize"): self.tokenize,
            ("POST", "/detokenize"): self.detokenize,
            ("POST", "/invocations"): self.chat,
        }
        if self.settings.lora and self.settings.runtime_lora:
            routes["POST", "/v1/load_lora_adapter"] = self.load
            routes["POST", "/v1/unload_lora_adapter"] = self.unload
            routes["POST", "/adapters"] = self.load_by_alias
            routes["DELETE", "/adapters/{name}"] = self.unload_by_alias
        return routes

    def all_routes(self) -> dict[tuple[str, str], Handler]:
        absent = (
            {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
            if self.settings.embeddings
            else {"/v1/embeddings"}
        )
        return {key: handler for key, handler in super().all_routes().items() if key[1] not in absent}

    def generation(self, request: Request, kind: Any) -> Generation:
        generation = super().generation(request, kind)
        if chosen := request.header("x-request-id"):
            generation.id = generation.id.partition("-")[0] + "-" + chosen
        return generation

    def default_limit(self, ask: Ask) -> int | None:
        return _COMPLETION_TOKENS if ask.kind == "completion" else None

    def resolve(self, ask: Ask) -> None:
        if ask.model in (None, "", self.settings.served_name):
            return
        ask.cold = not self.adapters.is_recent(ask.model)
        adapter = self.adapters.use(ask.model)
        if adapter is None:
            raise Refusal(self._unknown(ask.model))
        ask.adapter, ask.weights = adapter.name, adapter.weights

    def _unknown(self, model: Any) -> Reply:
        return self.book.reply("errors/unknown_model", {"nope": model, "base": self.settings.served_name})

    # ---- tokens

    async def tokenize(self, request: Request) -> Answer:
        """Ids of a prompt or of a conversation."""
        body = self.decoded(request)
        if body.get("model") not in (None, self.settings.served_name, *self.adapters.listed):
            return self._unknown(body["model"])
        text = chat_prompt(body["messages"], False).text if "messages" in body else body.get("prompt", "")
        answer = self.book["tokenize/tokenize"].json | {
            "count": count_tokens(text),
            "max_model_len": self.settings.context_tokens,
            "tokens": tokenize(text),
        }
        return json_reply(200, answer)

    async def detokenize(self, request: Request) -> Answer:
        """Text of ids."""
        return json_reply(200, {"prompt": detokenize(self.decoded(request)["tokens"])})

    # ---- adapters

    async def load(self, request: Request) -> Answer:
        """Take an adapter under a new name, or, when asked to, under one that is in use."""
        body = self.decoded(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if name is None or path is None:
            missing = "lora_name" if name is None else "lora_path"
            given = f"<dict of {len(body)} items>"
            return self.book.reply("lora/load_no_name", {"<dict of 1 items>": given, "lora_name": missing})
        if not name or not path:
            return self.book.reply("lora/load_empty_name")
        if name == self.settings.served_name:
            return self.book.reply("lora/load_as_base", {"base": name})
        if name in self.adapters.listed and not body.get("load_inplace"):
            return self.book.reply("lora/load_again", {"good": name})
        return await self._take(request, name, path, self.book.reply("lora/load", {"good": name}))

    async def load_by_alias(self, request: Request) -> Answer:
        """The same by another route, for another cloud's habits."""
        body = self.decoded(request)
        done = self.book.reply("lora/sagemaker_load", {"sage": body["name"]})
        return await self._take(request, body["name"], body["src"], done)

    async def _take(self, request: Request, name: str, path: str, done: Reply) -> Reply:
        await asyncio.sleep(self.script.load_ms / 1000)
        if request.lied_to:
            return done
        try:
            self.load_static(name, path)
        except AdapterFault as fault:
            return self._refused(name, path, fault)
        self.adapters.after_load(name, request.ignored)
        return done

    def load_static(self, name: str, path: str) -> None:
        adapter, directory = self.inspected(name, path)
        self._check(directory)
        self.adapters.add(adapter)

    def _check(self, directory: Directory) -> None:
        if directory.rank > self.settings.max_rank:
            raise AdapterFault("rank_too_high", {"64": directory.rank, "16": self.settings.max_rank})
        if directory.config.get("use_dora"):
            raise AdapterFault("dora")
        if directory.config.get("modules_to_save"):
            raise AdapterFault("modules_to_save", {"['lm_head']": directory.config["modules_to_save"]})
        made_for, ours = directory.hidden_size(), self.settings.hidden_size
        # Smaller shapes are taken without a word: vLLM copies them into a corner of its buffers.
        if made_for is not None and ours is not None and made_for > ours:
            raise AdapterFault("larger_base", {"576": ours, "1152": made_for})

    def _refused(self, name: str, path: str, fault: AdapterFault) -> Reply:
        if fault.kind in ("missing_path", "no_config") and not path.startswith("/"):
            return self.book.reply("lora/load_repo_path", {"lora x": f"lora {name}", "some/repo": path})
        recorded_name = "nowhere" if fault.kind == "missing_path" else fault.kind
        return self.book.reply(f"lora/load_{fault.kind}", {f"lora {recorded_name}": f"lora {name}", **fault.replace})

    async def unload(self, request: Request) -> Answer:
        """Take a name off the list."""
        body = self.decoded(request)
        name = body.get("lora_name")
        if name is None:
            return self.book.reply("lora/unload_no_name", {"<dict of 0 items>": f"<dict of {len(body)} items>"})
        return await self._drop(request, name, self.book.reply("lora/unload", {"good": name}))

    async def unload_by_alias(self, request: Request) -> Answer:
        """The same by another route."""
        name = last_part(request.path)
        return await self._drop(request, name, self.book.reply("lora/sagemaker_unload", {"sage": name}))

    async def _drop(self, request: Request, name: str, done: Reply) -> Reply:
        if name not in self.adapters.listed:
            return self.book.reply("lora/unload_again", {"good": name})
        await asyncio.sleep(self.script.unload_ms / 1000)
        if not request.lied_to:
            self.adapters.listed.pop(name, None)
        return done
