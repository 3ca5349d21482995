"""What the sim engine must answer, worked out from the tokens alone: for load tests that verify every text.

It knows nothing of engines, stores or hand-offs. Whatever those do, an answer that is not the oracle's came from KV
that was lost or wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from shared import wire
from shared.errors import SettingsError
from shared.model_files import model_folder, read_tokenizer, vocabulary_size
from shared.worker.sim.arguments import resolve
from shared.worker.sim.contents import Contents, History
from shared.worker.sim.text import Stops, TokenSampler, TokenTable


class OracleAnswer(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[int]
    text: str
    finish: wire.Finish


class Oracle:
    """Of one kind of sim engine."""

    def __init__(self, contents: Contents, table: TokenTable, max_model_len: int) -> None:
        self._contents = contents
        self._table = table
        self._max_model_len = max_model_len

    @classmethod
    def load(
        cls, model: str, revision: str = "", *, engine_args: Mapping[str, Any] | None = None, has_kv: bool = True
    ) -> "Oracle":
        """Of the engines that a cluster with this model, these engine arguments and this `sim_kv` runs.

        Raises SettingsError.
        """
        shape = resolve(engine_args or {}, has_kv=has_kv)
        table = _table(model, revision)
        contents = Contents(shape.fingerprint(model, table.vocabulary), shape.block_size)
        return cls(contents, table, shape.max_model_len)

    @classmethod
    def of_engine(cls, model: str, facts: Mapping[str, str]) -> "Oracle":
        """Of a running engine, by the labels of its `baton_engine_info`. Raises SettingsError when it is no sim."""
        try:
            contents = Contents(facts["fingerprint"], int(facts["block_size"]))
            return cls(contents, _table(model), int(facts["max_model_len"]))
        except (KeyError, ValueError):
            raise SettingsError(f"the texts of engine {facts.get('engine', 'unknown')} cannot be predicted") from None

    def answer(self, prompt: Sequence[int], sampling: wire.Sampling, choice: int = 0) -> OracleAnswer:
        """One choice, whole."""
        sampler, stops = TokenSampler(self._table, sampling, choice), Stops(sampling)
        history = History(self._contents, self._contents.read(prompt), prompt)
        tokens: list[int] = []
        texts: list[str] = []
        most = min(sampling.max_tokens, self._max_model_len - len(prompt))
        while True:
            index = sampler.next(history.state, 0, may_stop=len(tokens) >= sampling.min_tokens)
            token = self._table.ids[index]
            tokens.append(token)
            ending = stops.push(token, self._table.texts[index], is_last=len(tokens) >= most)
            texts.append(ending.text)
            if ending.finish is not None:
                return OracleAnswer(tokens=tokens, text="".join(texts), finish=ending.finish)
            history.push(token, self._table.hashes[index])

    def expected_tokens(
        self, prompt: Sequence[int], count: int, *, seed: int | None = None, choice: int = 0
    ) -> list[int]:
        """The first `count` tokens, nothing ending them early."""
        return self.answer(prompt, wire.Sampling(max_tokens=count, seed=seed), choice).tokens

    def expected_text(self, prompt: Sequence[int], count: int, *, seed: int | None = None, choice: int = 0) -> str:
        return self.answer(prompt, wire.Sampling(max_tokens=count, seed=seed), choice).text


def _table(model: str, revision: str = "") -> TokenTable:
    folder = model_folder(model, revision)
    tokenizer = read_tokenizer(folder, model)
    return TokenTable.of(tokenizer, vocabulary_size(folder, tokenizer))
