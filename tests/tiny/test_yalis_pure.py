"""The parts that decide without tensors: splits, launchers, the text of growing tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvrar.launch import Seat
from yalis import ConfigError, SamplingParams
from yalis.completion import Completion
from yalis.core import Sequence as Continuation
from yalis.parallel.launcher import detect
from yalis.parallel.split import even_split, kv_head_split, padded_split
from yalis.testing import make_checkpoint
from yalis.tokenizer import Detokenizer, Tokenizer

sizes = st.integers(1, 200)
ranks = st.integers(1, 17)


@given(sizes, ranks)
def test_even_split_covers_everything_once_and_evenly(size: int, num_ranks: int) -> None:
    parts = [even_split(size, num_ranks, rank) for rank in range(num_ranks)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(sizes, ranks)
def test_padded_split_covers_everything_once_with_all_padding_last(
    size: int, num_ranks: int
) -> None:
    parts = [padded_split(size, num_ranks, rank) for rank in range(num_ranks)]
    [width] = {width for _, width in parts}
    padded = [[*rows, *[None] * (width - len(rows))] for rows, _ in parts]
    flat = [i for part in padded for i in part]
    assert flat[:size] == list(range(size))
    assert set(flat[size:]) <= {None}


@given(st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_every_query_head_finds_its_key_head_on_its_own_rank(
    a: int, b: int, kv_is_more: bool
) -> None:
    num_ranks, num_kv_heads = (a, a * b) if kv_is_more else (a * b, a)
    num_heads = num_kv_heads * num_ranks  # any multiple of both
    for rank in range(num_ranks):
        mine = kv_head_split(num_kv_heads, num_ranks, rank)
        queries = even_split(num_heads, num_ranks, rank)
        per_key = len(queries) // len(mine)
        for place, query in enumerate(queries):
            assert mine[place // per_key] == query * num_kv_heads // num_heads


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "7",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "99",
    "SLURM_STEP_NODELIST": "gpu[007-008],login1",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "2",
}


def test_launchers_are_told_from_their_variables() -> None:
    assert detect({}) is None
    assert detect(TORCHRUN) == Seat("torchrun", 3, 4, 1, "h", 7)
    assert detect(TORCHRUN | SRUN) == Seat(
        "torchrun", 3, 4, 1, "h", 7
    )  # torchrun inside srun: torchrun's word
    place = detect(SRUN)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.host) == (5, 8, 1, "gpu007")
    assert detect(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == Seat(
        "Slurm", 0, 8, 0, "gpu007", place.port
    )
    assert detect(SRUN | {"SLURM_STEP_ID": "3"}) != place  # another step, another port
    assert detect(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_a_batch_script_is_no_srun_task() -> None:
    assert detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None


@pytest.mark.parametrize(
    "wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "x"}, {"MASTER_PORT": ""}]
)
def test_contradicting_variables_are_an_error(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        detect(TORCHRUN | wrong)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_checkpoint(tmp_path_factory.mktemp("t"), num_hidden_layers=1))


def test_any_text_survives_the_tokenizer_and_grows_piece_by_piece(tokenizer: Tokenizer) -> None:
    @settings(max_examples=200)
    @given(st.text(max_size=40))
    def check(text: str) -> None:
        assume("<s>" not in text and "</s>" not in text)  # these are not text, wherever they stand
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        growing = Detokenizer(tokenizer, ids[:1])
        pieces = [growing.append(token_id) for token_id in ids[1:]]
        assert "".join(pieces) == text
        assert tokenizer.decode_after(ids[:1], ids[1:]) == text

    check()


def test_streamed_pieces_join_to_the_text_before_the_first_stop(tokenizer: Tokenizer) -> None:
    @settings(max_examples=200)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = data.draw(st.text(alphabet="ab é🙂", min_size=1, max_size=30))
        stops = data.draw(st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=4), max_size=3))
        params = SamplingParams(stop=stops, max_tokens=1000)
        sequence = Continuation(0, 0, tuple(tokenizer.encode("x")), params, seed=0, max_len=10**6)
        completion, pieces = Completion(sequence, tokenizer, is_streamed=True), []
        for token_id in tokenizer.encode(text)[1:]:  # the first is <s>
            sequence.output_token_ids.append(token_id)
            completion.append(None)
            pieces.append(completion.take_text())
            assert not any(stop in "".join(pieces) for stop in stops)
            if sequence.is_finished:
                break
            held = completion._text[len("".join(pieces)) :]
            assert not held or any(stop.startswith(held) for stop in stops)
        is_stopped = sequence.is_finished
        assert is_stopped == any(stop in text for stop in stops)
        if not is_stopped:
            sequence.finish_reason = "length"
            pieces.append(completion.take_text())
        begins = [text.index(stop) for stop in stops if stop in text]
        assert "".join(pieces) == completion.output().text
        if len(stops) <= 1:
            assert completion.output().text == text[: min(begins, default=None)]

    check()


class Pieces:
    """A tokenizer whose tokens are these bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        return self.decode([*prompt, *ids])[len(self.decode(prompt)) :]


@pytest.mark.parametrize(("stop", "text"), [("STOP", "a"), ("P", "aSTO"), ("OPx", "aSTOP\ufffd")])
def test_a_stop_string_counts_though_half_a_character_follows_it(stop: str, text: str) -> None:
    params = SamplingParams(stop=stop, max_tokens=2)
    sequence = Continuation(0, 0, (0,), params, seed=0, max_len=3)
    tokenizer = cast("Tokenizer", Pieces(b"x", b"a", b"STOP" + "é".encode()[:1]))
    completion, shown = Completion(sequence, tokenizer, is_streamed=True), ""
    for token_id in (1, 2):
        sequence.output_token_ids.append(token_id)
        completion.append(None)
        shown += completion.take_text()
    assert (shown, completion.output().text) == (text, text)
    assert sequence.finish_reason == ("length" if "x" in stop else "stop")


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2's: in a run of bytes that is not all characters none is one."""
    pieces = [*"abc", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True))
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence([parts.ByteFallback(), parts.Fuse()])
    folder = tmp_path_factory.mktemp("t")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@given(st.text("abé龍🙂", min_size=1), st.text("abé龍🙂", min_size=1))
def test_characters_of_many_tokens_beside_each_other(
    byte_fallback: Tokenizer, before: str, text: str
) -> None:
    prompt, ids = byte_fallback.encode(before), byte_fallback.encode(text)
    growing = Detokenizer(byte_fallback, prompt)
    assert "".join(map(growing.append, ids)) == byte_fallback.decode_after(prompt, ids) == text
    if text[-1] not in "ab":
        cut = byte_fallback.decode_after(prompt, ids[:-1])
        assert cut.endswith("\ufffd")
        assert cut.rstrip("\ufffd") == text[:-1]


def test_a_stream_goes_on_where_the_whole_reads_otherwise(byte_fallback: Tokenizer) -> None:
    params = SamplingParams(stop="bca", max_tokens=8)
    sequence = Continuation(0, 0, (0,), params, seed=0, max_len=9)
    completion, shown = Completion(sequence, byte_fallback, is_streamed=True), ""
    smile = byte_fallback.encode("🙂")
    for token_id in (*smile, smile[0], *byte_fallback.encode("abc")):
        sequence.output_token_ids.append(token_id)
        completion.append(None)
        shown += completion.take_text()
    assert sequence.finish_reason == "length"
    assert completion.output().text == "\ufffd" * 5 + "abc"
    assert shown == "🙂" + "\ufffd" * 4 + "abc"


def test_no_piece_of_a_character_is_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    growing = Detokenizer(tokenizer, ids[:1])
    assert [growing.append(token_id) for token_id in ids[1:]] == ["", "", "", "🙂"]


def test_a_flood_of_broken_bytes_is_let_out_in_time(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("🙂")[1]  # one byte of four
    growing = Detokenizer(tokenizer, [0])
    pieces = [growing.append(broken) for _ in range(100)]
    assert len("".join(pieces)) > 60
    assert len(growing._window) < 60


def test_make_checkpoint_says_what_it_cannot_make(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 100; .* at least 258"):
        make_checkpoint(tmp_path / "a", vocab_size=100)
    with pytest.raises(ConfigError, match="num_shards is 99"):
        make_checkpoint(tmp_path / "b", num_shards=99, num_hidden_layers=1)
