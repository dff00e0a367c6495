"""What the emulated engines have in common: reading a request, finding what is wrong with it, composing an answer."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import unquote

import msgspec

from backends.emulator import checks
from backends.emulator.adapters import Adapter, Adapters, Directory, read
from backends.emulator.answers import Format, new_id
from backends.emulator.ask import Ask, chat_prompt, completion_prompts
from backends.emulator.batch import Batch
from backends.emulator.composing import Style, writers
from backends.emulator.embeddings import embeddings
from backends.emulator.metrics import Meter
from backends.emulator.recordings import Book, Reply, json_reply
from backends.emulator.responses import Response, chat_body
from backends.emulator.script import Script
from backends.emulator.settings import Settings
from backends.emulator.writer import Writer


@dataclass(slots=True)
class Request:
    """An HTTP request, read whole."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    lied_to: bool = False  # a fault wants success said and nothing done
    ignored: bool = False  # a fault wants the adapter listed and the base answering

    def header(self, name: str) -> str:
        return self.headers.get(name, "")


@dataclass(slots=True)
class Generation:
    """An answer that takes time: it runs in the batch, and may be streamed."""

    ask: Ask
    writers: list[Writer]
    id: str
    response: Response | None = None  # of the Responses API, instead of a chat's answer


@dataclass(slots=True)
class Death:
    """The engine's process ends, the request unanswered."""

    after_s: float = 0


Answer = Reply | Generation | Death
Handler = Callable[[Request], Awaitable[Answer]]


class Refusal(Exception):
    """The engine answers with an error."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


@dataclass
class Engine(ABC):
    """One emulated engine with its state."""

    settings: Settings
    book: Book
    script: Script
    batch: Batch = field(init=False)
    meter: Meter = field(init=False)
    adapters: Adapters = field(init=False)
    form: Format = field(init=False)
    health_ms: float = field(init=False, default=0)
    counts_end_token: ClassVar[bool] = True
    head_with_first_token: ClassVar[bool] = False  # of a stream; otherwise the head comes at once
    named_call_stops: ClassVar[bool] = False  # a tool forced by name ends with `stop`, not with `tool_calls`
    guards_everything_but: ClassVar[tuple[str, ...] | None] = None  # prefixes open without a key
    guards_only: ClassVar[tuple[str, ...]] = ()  # prefixes that want one

    def __post_init__(self) -> None:
        self.batch = Batch(self.settings)
        self.meter = Meter(self.book, self.settings, self.batch)
        self.adapters = Adapters(self.settings)
        self.form = self.make_format()

    # ---- what each engine says for itself

    @abstractmethod
    def make_format(self) -> Format:
        """How it writes answers."""

    @abstractmethod
    def routes(self) -> dict[tuple[str, str], Handler]:
        """(method, path) -> handler, beside those of every engine."""

    @abstractmethod
    def resolve(self, ask: Ask) -> None:
        """Find the adapter that `ask.model` names. Raises Refusal."""

    @abstractmethod
    def load_static(self, name: str, path: str) -> None:
        """Take an adapter of the command line. Raises AdapterFault."""

    def calls_forced_tool(self, ask: Ask) -> bool:
        """Whether a tool that the request forces is called, rather than written about."""
        return self.settings.tool_parser

    # ---- routes

    def all_routes(self) -> dict[tuple[str, str], Handler]:
        """Everything that this engine answers."""
        shared: dict[tuple[str, str], Handler] = {
            ("POST", "/v1/chat/completions"): self.chat,
            ("POST", "/v1/completions"): self.completion,
            ("POST", "/v1/responses"): self.responses,
            ("POST", "/v1/embeddings"): self.embed,
            ("GET", "/v1/models"): self.models,
            ("GET", "/health"): self.health,
        }
        if self.settings.metrics:
            shared["GET", "/metrics"] = self.metrics
        return shared | self.routes()

    def recorded(self, case: str) -> Handler:
        """A handler that answers as recorded."""

        async def answer(request: Request) -> Reply:
            return self.book.reply(case, {"{model_path}": self.settings.model_path, "base": self.settings.served_name})

        return answer

    def without_key(self, request: Request) -> Reply | None:
        """The refusal of a request whose key is missing or wrong; None where it may pass."""
        if not self.settings.api_keys or request.method == "OPTIONS":
            return None
        if self.guards_everything_but is not None:
            guarded = not request.path.startswith(self.guards_everything_but)
        else:
            guarded = request.path.startswith(self.guards_only)
        scheme, _, key = request.header("authorization").partition(" ")
        if not guarded or (scheme.lower() == "bearer" and key in self.settings.api_keys):
            return None
        return self.book.reply("auth/models_no_key")

    async def health(self, request: Request) -> Answer:
        """Whether the engine lives; in SGLang's case by a generation, which takes its time."""
        wanted_ms = self.script.health_ms
        await asyncio.sleep((self.health_ms if wanted_ms is None else wanted_ms) / 1000)
        return self.book.reply("models/health")

    async def metrics(self, request: Request) -> Answer:
        return self.meter.page()

    async def models(self, request: Request) -> Answer:
        """The base, then the adapters."""
        body = self.book["models/models"].json_copy()
        body["data"] = self.model_cards()
        return json_reply(200, body)

    def model_cards(self) -> list[dict[str, Any]]:
        """One object for each model, as /v1/models lists them."""
        base = self.book["models/models"].json["data"][0]
        adapter = self.book["lora/models_with_adapter"].json["data"][1]
        name, path = self.settings.served_name, self.settings.model_path
        cards = [self._card(base, name, path)]
        return cards + [self._card(adapter, held.name, held.path) for held in self.adapters.listed.values()]

    def _card(self, template: dict[str, Any], name: str, path: str) -> dict[str, Any]:
        card = template | {"id": name, "created": int(time.time())}
        if template["root"] == template["id"]:
            card["root"] = name
        else:
            card["root"] = path
        if template["parent"] is not None:
            card["parent"] = self.settings.served_name
        if template.get("max_model_len") is not None:
            card["max_model_len"] = self.settings.context_tokens
        if "permission" in template:
            fresh = {"id": new_id(template["permission"][0]["id"]), "created": card["created"]}
            card["permission"] = [template["permission"][0] | fresh]
        return card

    async def embed(self, request: Request) -> Answer:
        if not self.settings.embeddings:
            return self.book.reply("embeddings_off/embeddings")
        body = self.decoded(request)
        if refusal := checks.embedding_fault(self.book, self.settings, body):
            return refusal
        return embeddings(self.book, self.settings, body)

    # ---- generation

    async def chat(self, request: Request) -> Answer:
        return self.generation(request, "chat")

    async def completion(self, request: Request) -> Answer:
        return self.generation(request, "completion")

    async def responses(self, request: Request) -> Answer:
        """The Responses API: a chat whose answer is written otherwise."""
        body = self.decoded(request)
        if not self.knows(body.get("model")):
            names = {"nope": body["model"], "base": self.settings.served_name}
            return self.book.reply("responses/responses_unknown_model", names)
        request.body = msgspec.json.encode(chat_body(body))
        generation = self.generation(request, "chat")
        generation.response = Response(self.book, generation.ask, self.form.shown_model(generation.ask))
        return generation

    def knows(self, model: Any) -> bool:
        """Whether a model or adapter goes by this name."""
        return model in (None, self.settings.served_name) or str(model).rpartition(":")[2] in self.adapters.listed

    def decoded(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request. Raises Refusal."""
        if not request.header("content-type").lower().startswith("application/json"):
            raise Refusal(self.book.reply("errors/wrong_content_type"))
        if not request.body:
            raise Refusal(self.book.reply("errors/empty_body"))
        try:
            body = msgspec.json.decode(request.body)
        except UnicodeDecodeError as error:
            raise Refusal(self.book.reply("errors/not_utf8")) from error
        except msgspec.DecodeError as error:
            raise Refusal(self._bad_json(request)) from error
        if not isinstance(body, dict):
            raise Refusal(self.book.reply("errors/json_array"))
        return body

    def _bad_json(self, request: Request) -> Reply:
        if "lora" in request.path:
            return self.book.reply("lora/load_bad_json")
        try:
            json.loads(request.body)
        except UnicodeDecodeError:
            return self.book.reply("errors/not_utf8")
        except json.JSONDecodeError as error:
            return self.book.reply("errors/bad_json", {"31": error.pos, "Expecting value": error.msg})
        return self.book.reply("errors/bad_json")

    def generation(self, request: Request, kind: Any) -> Generation:
        """Read, check and plan. Raises Refusal."""
        body = self.decoded(request)
        ask = Ask(kind, body, body.get("model"))
        if refusal := checks.type_fault(self.book, ask):
            raise Refusal(refusal)
        self.resolve(ask)
        if refusal := checks.value_fault(self.book, self.settings, ask):
            raise Refusal(refusal)
        if kind == "chat":
            continued = bool(ask.get("continue_final_message"))
            ask.prompts = [chat_prompt(ask.body["messages"], continued)]
        else:
            ask.prompts = completion_prompts(ask.body["prompt"])
        if refusal := checks.length_fault(self.book, self.settings, ask):
            raise Refusal(refusal)
        id = new_id(self.book["chat/chat" if kind == "chat" else "completions/completion"].json["id"])
        style = Style(
            context_tokens=self.settings.context_tokens,
            default_limit=self.default_limit(ask),
            counts_end_token=self.counts_end_token,
            parses_tools=self.settings.tool_parser,
            calls_forced_tool=self.calls_forced_tool(ask),
            named_call_stops=self.named_call_stops,
        )
        return Generation(ask, writers(ask, style, self.script), id)

    def default_limit(self, ask: Ask) -> int | None:
        """Tokens of an answer whose request does not say; None: what the context leaves."""
        return None

    # ---- faults

    def fault_error(self, status: int) -> Any:
        """The engine's error object for a fault on demand: its own shape, our words."""
        shape = self.book["errors/context_overflow"].json_copy()
        error = shape.get("error", shape)
        return error | {"message": "fault on demand", "type": "InternalServerError", "param": None, "code": status}

    def fault_reply(self, status: int) -> Reply:
        """A whole answer with that error."""
        error = self.fault_error(status)
        nested = "error" in self.book["errors/context_overflow"].json
        return json_reply(status, {"error": error} if nested else error)

    # ---- adapters

    def inspected(self, name: str, path: str) -> tuple[Adapter, Directory]:
        """Read an adapter directory and compare it with the base. Raises AdapterFault."""
        directory = read(path)
        made_for = directory.hidden_size()
        fits = made_for is None or self.settings.hidden_size in (None, made_for)
        return Adapter(name, path, directory.weights, fits), directory


def last_part(path: str) -> str:
    """The decoded last segment of a path."""
    return unquote(path.rsplit("/", 1)[-1])
