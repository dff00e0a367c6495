"""Play a generation: wait in the batch, write in the script's time, break off where a fault wants it."""

from __future__ import annotations

import asyncio
import time

from backends.emulator.answers import Usage
from backends.emulator.ask import Prompt
from backends.emulator.channel import Channel
from backends.emulator.engines.base import Engine, Generation
from backends.emulator.events import EVENT_STREAM, Events, error_events, escaped
from backends.emulator.language import Token, spell
from backends.emulator.responses import Response
from backends.emulator.script import Fault
from backends.emulator.writer import Piece, Writer

_STEPS_BETWEEN_YIELDS = 8  # of an unpaced stream, so that it does not keep others waiting


async def play(engine: Engine, generation: Generation, channel: Channel, fault: Fault | None) -> None:
    """Answer in full. Cancelled when the client goes away, it counts as aborted."""
    ask, meter = generation.ask, engine.meter
    channel.sight.adapter = ask.adapter
    started_at_s = time.monotonic()
    if ask.stream and not engine.head_with_first_token:
        await channel.begin(200, (EVENT_STREAM,))
    await engine.batch.enter(ask.adapter)
    reason = "abort"
    try:
        cold_ms = engine.script.load_ms if ask.cold else 0
        await _sleep_ms(engine.script.ttft_ms + cold_ms)
        first_at_s = time.monotonic()
        meter.prompt_tokens += sum(prompt.tokens for prompt in ask.prompts)
        if ask.stream:
            await _Stream(engine, generation, channel, fault).play()
        else:
            await _whole(engine, generation, channel)
        reason = generation.writers[0].reason
    finally:
        engine.batch.leave(ask.adapter)
        meter.finished[reason] += 1
        tokens = sum(writer.tokens for writer in generation.writers)
        meter.generation_tokens += tokens
    ended_at_s = time.monotonic()
    meter.ttft.observe(first_at_s - started_at_s)
    meter.latency.observe(ended_at_s - started_at_s)
    if tokens > 1:
        meter.inter_token.observe((ended_at_s - first_at_s) / (tokens - 1), tokens - 1)


async def _whole(engine: Engine, generation: Generation, channel: Channel) -> None:
    ask = generation.ask
    texts: list[str] = []
    tokens: list[list[Token]] = []
    for writer in generation.writers:
        pieces = list(writer.pieces())
        texts.append("".join(piece.text for piece in pieces))
        tokens.append([token for piece in pieces for token in piece.tokens])
    longest = max(len(chosen) for chosen in tokens)
    await _sleep_ms(engine.script.inter_token_ms * max(longest - 1, 0))
    if generation.response is not None:
        [writer], [text] = generation.writers, texts
        usage = Usage(ask.prompts[0].tokens, writer.tokens)
        await channel.reply(generation.response.whole(text, usage, writer.reason))
        return
    if engine.form.echoes and ask.get("echo"):
        share = len(texts) // len(ask.prompts)
        prompts = [ask.prompts[index // share] for index in range(len(texts))]
        texts = [prompt.text + text for prompt, text in zip(prompts, texts, strict=True)]
        tokens = [[*spell(prompt.text), *chosen] for prompt, chosen in zip(prompts, tokens, strict=True)]
    await channel.reply(engine.form.whole(ask, generation.writers, texts, tokens, generation.id))


class _Stream:
    """One streamed answer."""

    def __init__(self, engine: Engine, generation: Generation, channel: Channel, fault: Fault | None) -> None:
        self.engine, self.generation, self.channel, self.fault = engine, generation, channel, fault
        self.ask = generation.ask
        self.events = Events(engine.form, self.ask, generation.id)
        self.steps = 0
        self.next_at_s = time.monotonic()

    async def play(self) -> None:
        writers = self.generation.writers
        if self.engine.head_with_first_token:
            await self.channel.begin(200, (EVENT_STREAM,))
        if self.generation.response is not None:
            await self._play_response(self.generation.response)
            return
        one_by_one = self.engine.form.completions_share_index and self.ask.kind == "completion"
        for group in [[writer] for writer in writers] if one_by_one else [writers]:
            if await self._play_together(group):
                return
        prompt_tokens = sum(prompt.tokens for prompt in self.ask.prompts)
        completion_tokens = sum(writer.tokens for writer in writers)
        await self.channel.end(self.events.end(Usage(prompt_tokens, completion_tokens)))

    async def _play_together(self, writers: list[Writer]) -> bool:
        """Write some choices in step. True: a fault has ended the stream."""
        opening = b"".join(self.events.open(writer.index, [self._prompt(writer)]) for writer in writers)
        if opening and await self._send(opening, len(writers)):
            return True
        for writer in writers:
            if writer.tool is not None and await self._send(self.events.call(writer), 1):
                return True
        if len(writers) == 1 and self._is_plain(writers[0]):
            await self._play_plain(writers[0])
            return False
        live = [(writer, writer.pieces()) for writer in writers]
        while live:
            step = [(writer, next(pieces)) for writer, pieces in live]
            await self._pace(max(len(piece.tokens) for _, piece in step))
            if await self._send(self._step(step), len(step)):
                return True
            live = [pair for pair, (_, piece) in zip(live, step, strict=True) if not piece.last]
        return False

    async def _play_response(self, response: Response) -> None:
        [writer], text = self.generation.writers, ""
        if await self._send(response.begin(), 1):
            return
        for piece in writer.pieces():
            await self._pace(len(piece.tokens))
            text += piece.text
            if piece.text and await self._send(response.delta(piece.text), 1):
                return
        await self.channel.end(response.end(text, self._usage(writer), writer.reason))

    def _is_plain(self, writer: Writer) -> bool:
        """Nothing but text, as fast as it goes: what a benchmark asks for."""
        unpaced = not self.engine.script.inter_token_ms and self.fault is None
        return unpaced and self.events.plain and writer.tool is None and not self.ask.get("echo")

    async def _play_plain(self, writer: Writer) -> None:
        prefix, suffix = self.events.frame(writer.index)
        framing, compact = len(prefix) + len(suffix), self.events.recorded.compact
        ready: list[bytes] = []
        for piece in writer.pieces():
            if piece.last:
                break
            text = escaped(piece.text, compact)
            ready.append(b"%x\r\n%b%b%b\r\n" % (framing + len(text), prefix, text, suffix))
            if len(ready) == _STEPS_BETWEEN_YIELDS:
                await self.channel.raw_events(ready)
                ready = []
        await self.channel.raw_events(ready)
        await self.channel.events(self.events.close(writer, piece, self._usage(writer)), 1)

    def _step(self, step: list[tuple[Writer, Piece]]) -> bytes:
        going = [(writer, piece) for writer, piece in step if not piece.last]
        ending = [(writer, piece) for writer, piece in step if piece.last]
        if self.steps <= 1 and self.engine.form.echoes and self.ask.get("echo"):
            for writer, piece in step:
                piece.text = self._prompt(writer).text + piece.text
        if len(going) > 1 and self.engine.form.merges_choices:
            data = self.events.merged([self.events.piece_dict(w, p, self._usage(w)) for w, p in going])
        else:
            data = b"".join(self.events.piece(writer, piece, self._usage(writer)) for writer, piece in going)
        return data + b"".join(self.events.close(writer, piece, self._usage(writer)) for writer, piece in ending)

    def _prompt(self, writer: Writer) -> Prompt:
        return self.ask.prompts[writer.index * len(self.ask.prompts) // len(self.generation.writers)]

    def _usage(self, writer: Writer) -> Usage:
        return Usage(self._prompt(writer).tokens, writer.tokens)

    async def _pace(self, tokens: int) -> None:
        self.steps += 1
        gap_ms = self.engine.script.inter_token_ms * tokens
        if gap_ms and self.steps > 1:
            self.next_at_s += gap_ms / 1000
            await asyncio.sleep(max(self.next_at_s - time.monotonic(), 0))
        elif self.steps == 1:
            self.next_at_s = time.monotonic()
        elif self.steps % _STEPS_BETWEEN_YIELDS == 0:
            await asyncio.sleep(0)

    async def _send(self, data: bytes, count: int) -> bool:
        """Send events; True when a fault takes their place and the stream is over."""
        fault, channel = self.fault, self.channel
        if fault is not None and channel.sight.chunks >= fault.after_chunks:
            self.fault = None
            if await self._break(fault):
                return True
        await channel.events(data, count)
        return False

    async def _break(self, fault: Fault) -> bool:
        channel = self.channel
        await asyncio.sleep(0.01)  # lets what was written before reach the wire
        match fault.kind:
            case "stream_delay":
                await _sleep_ms(fault.delay_ms)
                return False
            case "stream_garbage":
                await channel.events(b"data: {this is not JSON\n\n", 1)
                return False
            case "stream_hang":
                await channel.hang()
            case "stream_reset":
                await channel.reset()
            case "stream_close":
                await channel.close()
            case "stream_truncate":
                await channel.end()
            case "stream_error":
                await channel.end(error_events(self.events.recorded, self.engine.fault_error(fault.status)))
            case "stream_die":
                channel.die()
        return True


async def _sleep_ms(duration_ms: float) -> None:
    if duration_ms:
        await asyncio.sleep(duration_ms / 1000)
