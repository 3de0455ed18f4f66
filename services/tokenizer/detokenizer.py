"""The sequences of one DetokenizeStream: takes what an engine step brought, answers what became text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

from mxgpt.v1 import tokenizer_pb2
from services.tokenizer.harmony import HarmonyStream
from services.tokenizer.sequence_text import PlainStream, SequenceText
from services.tokenizer.stop_strings import StopStrings
from services.tokenizer.vocabulary import Vocabulary
from shared.errors import ServiceError, invalid_field

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_SEQUENCES = 65_536
NUM_ENDED_KEPT = 65_536  # ids may still be on their way to a sequence that has ended here


class Detokenizer:
    """All sequences of one stream. An error ends the sequence that it is about, and no other."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._sequences: dict[int, SequenceText] = {}
        self._ended_ids: OrderedDict[int, None] = OrderedDict()
        self._stop_strings: WeakValueDictionary[tuple[str, ...], StopStrings] = WeakValueDictionary()

    @property
    def num_sequences(self) -> int:
        """Sequences open now."""
        return len(self._sequences)

    def handle(self, request: tokenizer_pb2.DetokenizeStreamRequest) -> tokenizer_pb2.DetokenizeStreamResponse:
        """The answer to one message: an entry for each sequence with something to say."""
        answers: dict[int, tokenizer_pb2.SequenceText] = {}
        for sequence_open in request.opens:
            self._answer(answers, sequence_open.sequence_id, sequence_open)
        for tokens in request.tokens:
            self._answer(answers, tokens.sequence_id, tokens)
        for sequence_id in request.closed_ids:
            self._sequences.pop(sequence_id, None)
            self._ended_ids.pop(sequence_id, None)
            answers.pop(sequence_id, None)
        return tokenizer_pb2.DetokenizeStreamResponse(texts=answers.values())

    def _answer(
        self,
        answers: dict[int, tokenizer_pb2.SequenceText],
        sequence_id: int,
        change: tokenizer_pb2.SequenceOpen | tokenizer_pb2.SequenceTokens,
    ) -> None:
        """Apply a change to one sequence, and add what it releases to that sequence's answer."""
        answer = answers.get(sequence_id)
        if answer is not None and (answer.error_reason or answer.stopped or answer.finished):
            return  # it has ended in this message, whatever is said of it after that
        sequence = self._sequences.get(sequence_id)
        is_finished = False
        try:
            if isinstance(change, tokenizer_pb2.SequenceOpen):
                sequence = self._open(change)
            elif sequence is not None:
                is_finished = change.finished
                sequence.feed(change.token_ids)
                if is_finished:
                    sequence.finish()
            elif sequence_id in self._ended_ids:
                return
            else:
                raise invalid_field("tokens.sequence_id", f"sequence {sequence_id} is not open on this stream")
        except ServiceError as error:
            self._end(sequence_id)
            answers[sequence_id] = tokenizer_pb2.SequenceText(
                sequence_id=sequence_id, error_reason=error.reason.name, error_message=error.message
            )
            return
        segments = sequence.take()
        stop = sequence.matched_stop
        if not (segments or stop is not None or is_finished):
            return
        if answer is None:
            answer = answers[sequence_id] = tokenizer_pb2.SequenceText(sequence_id=sequence_id)
        for num_ids, text, channel, recipient in segments:
            answer.segments.add(num_token_ids=num_ids, text=text, channel=channel, recipient=recipient)
        if stop is not None:
            answer.stopped = True
            answer.matched_stop = stop
            self._end(sequence_id)
        elif is_finished:
            answer.finished = True
            self._end(sequence_id)

    def _open(self, request: tokenizer_pb2.SequenceOpen) -> SequenceText:
        sequence_id = request.sequence_id
        if sequence_id in self._sequences:
            raise invalid_field("opens.sequence_id", f"sequence {sequence_id} is open already")
        if len(self._sequences) >= MAX_SEQUENCES:
            raise invalid_field("opens", f"{MAX_SEQUENCES} sequences are open on this stream already")
        if request.num_released > len(request.replayed_token_ids):
            why = f"{request.num_released} of {len(request.replayed_token_ids)} replayed ids can't have been released"
            raise invalid_field("opens.num_released", why)
        sequence = self._new_sequence(request)
        self._ended_ids.pop(sequence_id, None)
        self._sequences[sequence_id] = sequence
        sequence.feed(request.replayed_token_ids)
        return sequence

    def _new_sequence(self, request: tokenizer_pb2.SequenceOpen) -> SequenceText:
        stops = self._find_stop_strings(request.stop_strings)
        table = self._vocabulary.table(request.special_tokens)
        prompt = request.prompt_token_ids
        if not request.harmony:
            return PlainStream(table, prompt, stops, request.min_tokens, request.num_released)
        markers = self._vocabulary.harmony_markers
        if not markers:
            raise invalid_field("opens.harmony", "the model's vocabulary lacks special tokens of Harmony")
        return HarmonyStream(table, markers, prompt, stops, request.min_tokens, request.num_released)

    def _find_stop_strings(self, texts: Sequence[str]) -> StopStrings | None:
        """Those of a new sequence; the outputs of a request have theirs in common."""
        _check_stop_strings(texts)
        if not texts:
            return None
        key = tuple(texts)
        found = self._stop_strings.get(key)
        if found is None:
            found = self._stop_strings[key] = StopStrings(key)
        return found

    def _end(self, sequence_id: int) -> None:
        self._sequences.pop(sequence_id, None)
        self._ended_ids[sequence_id] = None
        if len(self._ended_ids) > NUM_ENDED_KEPT:
            self._ended_ids.popitem(last=False)


def _check_stop_strings(texts: Sequence[str]) -> None:
    if len(texts) > MAX_STOP_STRINGS:
        raise invalid_field("opens.stop_strings", f"{len(texts)} of them, and {MAX_STOP_STRINGS} are taken")
    for index, text in enumerate(texts):
        if not 1 <= len(text.encode()) <= MAX_STOP_STRING_BYTES:
            why = f"has {len(text.encode())} bytes, outside [1, {MAX_STOP_STRING_BYTES}]"
            raise invalid_field(f"opens.stop_strings[{index}]", why)
