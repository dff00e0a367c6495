"""LMDeploy: adapters from the command line only, flat errors, and an engine that an empty prompt ends for good."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from backends.emulator.adapters import AdapterFault
from backends.emulator.answers import Format
from backends.emulator.ask import Ask
from backends.emulator.engines.base import Answer, Engine, Generation, Handler, Refusal, Request
from backends.emulator.events import EVENT_STREAM, error_events
from backends.emulator.language import Token, tokenize
from backends.emulator.recordings import Reply, json_reply
from backends.emulator.writer import Writer

_DEAD_DELAY_S = 1


class LmdeployFormat(Format):
    """Token ids as `output_ids`, no second listing of the chosen token, tokens as the tokenizer spells them."""

    lists_chosen_token = False
    merges_choices = True
    echoes = False
    completions_share_index = True

    def add_ids(self, choice: dict[str, Any], ids: list[int]) -> None:
        if "text" not in choice:
            choice["output_ids"] = ids

    def token_text(self, token: Token) -> str:
        return token.text.replace(" ", "Ġ").replace("\n", "Ċ")

    def logprobs(self, ask: Ask, writer: Writer, tokens: list[Token], offset: int = 0) -> Any:
        return super().logprobs(ask, writer, tokens, offset) if ask.kind == "chat" else None

    def put_text(self, choice: dict[str, Any], ask: Ask, writer: Writer, text: str) -> None:
        super().put_text(choice, ask, writer, text)
        if ask.kind == "chat" and writer.tool is None and not text:
            choice["message"]["content"] = None


class Lmdeploy(Engine):
    """The server of `lmdeploy serve api_server`."""

    guards_everything_but = ("/health", "/docs", "/redoc", "/nodes")
    counts_end_token = False
    died_at_s: float | None = None

    def make_format(self) -> Format:
        return LmdeployFormat(self.book, self.settings.served_name)

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("POST", "/v1/encode"): self.encode,
            ("GET", "/is_sleeping"): self.recorded("admin/is_sleeping"),
            ("GET", "/terminate"): self.recorded("admin/terminate"),
            ("POST", "/abort_request"): self.recorded("admin/abort_request"),
            ("GET", "/distserve/engine_info"): self.recorded("admin/engine_info"),
        }

    async def health(self, request: Request) -> Answer:
        if self.died_at_s is not None and time.monotonic() - self.died_at_s > self.script.health_lag_s:
            return self.book.reply("deadly/health_later")
        if self.settings.backend == "turbomind":
            return self.book.reply("turbomind/health")
        return await super().health(request)

    def calls_forced_tool(self, ask: Ask) -> bool:
        return super().calls_forced_tool(ask) and ask.get("tool_choice") == "required"

    def resolve(self, ask: Ask) -> None:
        if ask.model == self.settings.served_name:
            return
        adapter = self.adapters.use(ask.model)
        if adapter is None:
            raise Refusal(self.book.reply("errors/unknown_model", {"nope": ask.model}))
        ask.adapter, ask.weights = adapter.name, adapter.weights

    def load_static(self, name: str, path: str) -> None:
        adapter, _ = self.inspected(name, path)
        if not adapter.fits:
            raise AdapterFault("wrong_base")
        self.adapters.add(adapter)

    async def chat(self, request: Request) -> Answer:
        return await self._alive(self.generation(request, "chat"))

    async def completion(self, request: Request) -> Answer:
        generation = self.generation(request, "completion")
        if any(not prompt.tokens for prompt in generation.ask.prompts):
            self.died_at_s = self.died_at_s or time.monotonic()
        # One choice a prompt, whatever `n` says.
        generation.writers = generation.writers[:: generation.ask.n]
        for index, writer in enumerate(generation.writers):
            writer.index = index
        return await self._alive(generation)

    async def _alive(self, generation: Generation) -> Answer:
        ask = generation.ask
        if self.died_at_s is not None:
            await asyncio.sleep(_DEAD_DELAY_S)
            if not ask.stream:
                return self.book.reply("deadly/chat_after")
            recorded = self.book["deadly/chat_stream_after"]
            return Reply(200, error_events(recorded, (recorded.events or [])[0]["error"]), (EVENT_STREAM,))
        if ask.kind == "completion" and ask.stream and ask.logprobs:
            return Reply(200, b"", (EVENT_STREAM,))  # as recorded: the stream begins, and ends without an event
        return generation

    async def encode(self, request: Request) -> Answer:
        """Ids of a text, or of each of a list."""
        given = self.decoded(request)["input"]
        if isinstance(given, str):
            ids = tokenize(given)
            return json_reply(200, {"input_ids": ids, "length": len(ids)})
        lists = [tokenize(text) for text in given]
        return json_reply(200, {"input_ids": lists, "length": [len(ids) for ids in lists]})
