"""lm-evaluation-harness over Quasar: accuracy under any scheme is their command.

    python -m quasar.evaluation.lm_harness run --model quasar --tasks gsm8k \\
        --model_args model=Qwen/Qwen3-0.6B,precision=w8a8,draft=ngram

is `lm_eval run --model quasar ...`: the harness has no way for other packages to announce a model, so this module
does it and hands over. Needs `pip install lm_eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from quasar.errors import QuasarError
from quasar.generation import GenerationSettings, generate
from quasar.loading import load

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise QuasarError("the harness is not installed; pip install lm_eval") from None


@register_model("quasar")
class QuasarLM(TemplateLM):
    """Scores by the verifier's own distributions, generates by speculative decoding."""

    def __init__(
        self,
        model: str,
        precision: str = "w8a8",
        draft: str = "ngram",
        gamma: int | None = None,
        lossless: bool = False,
        device: str | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Arguments as in `quasar.load` and `GenerationSettings`. The harness also gives device and batch sizes;
        sequences are run one at a time whatever they say."""
        super().__init__()
        self._settings = GenerationSettings(
            max_new_tokens=max_new_tokens, draft=draft, gamma=gamma, lossless=lossless, seed=seed
        )
        self._model = load(
            model,
            device=device or "auto",
            precision=precision,
            lossless=lossless,
            trust_remote_code=trust_remote_code,
        )
        if self._model.tokenizer is None:
            raise QuasarError(f"{model} has random weights and no tokenizer: tasks need a real model")
        self.tokenizer = self._model.tokenizer
        # Lossless output is full precision's, so its scores are too.
        self._decoder = self._model.full if lossless else self._model.decoder

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids): log p(continuation | context), and whether it is what
        greedy decoding would say. What exceeds the model's length loses its beginning."""
        scored = []
        for texts, context, continuation in tqdm(requests, desc="scoring", disable=disable_tqdm):
            scored.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, scored[-1])
        return scored

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        ids = [*context, *continuation][-(self._decoder.config.max_position_embeddings + 1) :]
        following = ids[-min(len(continuation), len(ids) - 1) :]
        inputs = ids[:-1]
        logits = self._decoder.read(inputs, logits_to_keep=len(following))
        log_probs = logits.log_softmax(dim=-1)
        total = sum(log_probs[i, token].item() for i, token in enumerate(following))
        return total, logits.argmax(dim=-1).tolist() == following

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text), in windows of the model's length that each begin with the last token of the one before."""
        totals = []
        length = self._decoder.config.max_position_embeddings
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm):
            ids = [self.eot_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            windows = [ids[at : at + length + 1] for at in range(0, len(ids) - 1, length)]
            totals.append(sum(self._score(window[:1], window[1:])[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each (context, settings) to a stop text or the token limit."""
        texts = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            context, options = request.args
            until = options.get("until") or []
            settings = replace(
                self._settings,
                max_new_tokens=int(options.get("max_gen_toks", self._settings.max_new_tokens)),
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                top_p=float(options.get("top_p", 1.0)),
                stop=(until,) if isinstance(until, str) else tuple(until),
            )
            room = self._model.config.max_position_embeddings - settings.max_new_tokens
            ids = self.tok_encode(context)[-max(room, 1) :]
            texts.append(generate(self._model, ids, settings).result().text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
