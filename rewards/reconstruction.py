"""How much likelier the other side's text is to a frozen decoder that sees a rationale's vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Written
from grace_rl.embed.rebuild import rebuild_logps, right_padded
from grace_rl.reward import RewardBatch, RewardOutput

Score = Literal["gain", "contrastive"]


class Reconstruction:
    """Write what lets a reader, who sees one vector of your words, tell the other side's text.

    In plain words, for each rollout:

    1. A frozen copy of a model that `method: reconstruction` has trained reads the rationale into
       one vector, as its own `grace.json` says.
    2. The same copy says how likely each token of the counterpart is (the query's positive, the
       positive's query, a negative's paraphrase), given this vector and the tokens before it.
    3. From each log-probability that without any rationale is subtracted: the vector is then the
       mean one. The difference is clipped and averaged over the tokens. This is the reward: the
       information that the rationale has about the other side, in nats per token.

    `score: contrastive` takes these gains for the counterpart and for the row's own hard negatives,
    and pays the log-softmax at the counterpart: what is likely after any rationale earns nothing.

    The vector is the only way from the rationale to the text, so that listing the words of likely
    texts pays less than it would for a reader of the words. The decoder never changes, else policy
    and decoder would agree on a private code.

    Args:
        model: folder of the decoder, such as `runs/tiny-en-reconstruction/model`; in a recipe of
            stages also `stage:reconstruction`. None is the model that training starts from.
        score: `gain` or `contrastive`.
        clip: largest absolute difference per token, in nats, above 0; 4 keeps single names from
            deciding.
        max_target_tokens: tokens of the other side that count, from its beginning, at least 1.
        temperature: divides the gains of `contrastive`, in nats per token; above 0.
        batch_size: texts per forward.

    Requirements: the counterpart among the roles (rolled out or an anchor), for `contrastive` a
    hard negative too; what has none is not scored. No columns.

    Recommendations: beside `contrastive` with a weight of 0.2 to 0.3 and
    `multi_objective_aggregation: normalize_then_sum`, since nats and cosines have no common scale.
    Watch `rewards/reconstruction/gain`, and whether the rationales stay true: on scenes a decoder
    that had only read texts was pleased by false facts, and beside `contrastive` it did harm
    (docs/results.md). Compare with the recipe without it.

    Relations: `contrastive` compares vectors and asks nothing about what can be read from them. It
    looks at words and not at `batch.embeddings`, so it is no potential for `stepwise`.

    Source: the decoder is that of bidirectional reconstruction (EMNLP 2025 main 216);
    log-likelihood of a reference as a reward is compared in arXiv 2602.03979. Its use on an
    embedding is ours.

    Raises:
        ValueError: an argument is out of range. On the first batch: the folder holds no model with
            a `grace.json`.
    """

    def __init__(
        self,
        model: str | None = None,
        score: Score = "gain",
        clip: float = 4.0,
        max_target_tokens: int = 64,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        self.check(model, score, clip, max_target_tokens, temperature, batch_size)
        self.model = model
        self.score = score
        self.clip = clip
        self.max_target_tokens = max_target_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.decoder: RationaleEncoder | None = None
        self._null: dict[str, Tensor] = {}  # text -> (L,) log-probabilities without a rationale

    @staticmethod
    def check(
        model: str | None,
        score: Score,
        clip: float,
        max_target_tokens: int,
        temperature: float,
        batch_size: int,
    ) -> None:
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, not {score!r}")
        for name, value in (("clip", clip), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        for name, count in (("max_target_tokens", max_target_tokens), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if model is not None and not (Path(model) / "grace.json").is_file():
            raise ValueError(
                f"model {model} is not that of a finished run (no grace.json); "
                "train one with method: reconstruction"
            )

    def start_from(self, policy: str) -> None:
        """Told by the trainer where its policy was loaded from; the decoder if none is named."""
        if self.model is None:
            self.model = policy

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        decoder = self._load(batch.embeddings.device)
        texts = batch.pool.by_text
        positive = batch.positives()[:, texts.rows]  # (B, G)
        wanted = positive.clone()
        if self.score == "contrastive":
            wanted |= batch.hard_negatives()[:, texts.rows]
        gains = self._gains(decoder, batch, wanted, texts.texts)  # (B, G), NaN where not wanted
        counterpart = gains.where(positive, torch.nan).nanmean(1)
        components = {"gain": counterpart}
        values = counterpart
        if self.score == "contrastive":
            logits = (gains / self.temperature).masked_fill(positive | ~wanted, -torch.inf)
            logits = torch.cat([counterpart[:, None] / self.temperature, logits], dim=1)
            values = logits.log_softmax(1)[:, 0]
            values = values.where((wanted & ~positive).any(1), torch.nan)
        return RewardOutput(values=values, components=components)

    def _load(self, device: torch.device) -> RationaleEncoder:
        if self.decoder is None:
            if self.model is None:
                raise ValueError("give model: the folder of a model that can rebuild texts")
            self.decoder = RationaleEncoder.from_pretrained(self.model, str(device))
            self.decoder.model.requires_grad_(False).eval()
        return self.decoder

    @torch.no_grad()
    def _gains(
        self, decoder: RationaleEncoder, batch: RewardBatch, wanted: Tensor, texts: list[str]
    ) -> Tensor:
        """(B, G) clipped gain per token of each wanted text, NaN elsewhere."""
        raw = decoder.reader.read(self._written(decoder, batch))
        vectors = decoder.reader.parts_of(raw)[-1]  # of the words
        pairs = wanted.nonzero().tolist()
        targets = {text: self._target(decoder, texts[text]) for _, text in pairs}
        missing = [t for t in targets if texts[t] not in self._null]
        nothing = self._nothing(decoder, vectors)
        for text, logps in zip(
            missing,
            self._logps(decoder, nothing.expand(len(missing), -1), [targets[t] for t in missing]),
            strict=True,
        ):
            self._null[texts[text]] = logps
        gains = batch.embeddings.new_full(wanted.shape, torch.nan)
        rows = [row for row, _ in pairs]
        found = self._logps(decoder, vectors[rows], [targets[text] for _, text in pairs])
        for (row, text), given in zip(pairs, found, strict=True):
            difference = given - self._null[texts[text]]
            gains[row, text] = difference.clamp(-self.clip, self.clip).mean()
        return gains

    def _nothing(self, decoder: RationaleEncoder, vectors: Tensor) -> Tensor:
        """(1, H) the vector that says nothing: the mean one of the stage, else zero."""
        centre = decoder.reader.centre
        if centre is None:
            return torch.zeros_like(vectors[:1])
        return decoder.reader.parts_of(centre.to(vectors))[-1][None]

    def _written(self, decoder: RationaleEncoder, batch: RewardBatch) -> list[Written]:
        """The rationales in the decoder's own tokens."""
        end: Any = decoder.tokenizer.eos_token_id
        ids = decoder.tokenizer(batch.rationales, add_special_tokens=False)["input_ids"]
        prompts = [decoder.template.render(text) for text in batch.texts]
        items = zip(prompts, ids, batch.rationales, strict=True)
        return [Written(prompt, [*row, end], text) for prompt, row, text in items]

    def _target(self, decoder: RationaleEncoder, text: str) -> list[int]:
        prompt = decoder.template.render(text)
        ids = prompt.token_ids[slice(*prompt.span)]
        end: Any = decoder.tokenizer.eos_token_id
        return [*ids, end][: self.max_target_tokens]

    def _logps(
        self, decoder: RationaleEncoder, vectors: Tensor, targets: list[list[int]]
    ) -> list[Tensor]:
        """Log-probabilities of each target's tokens, texts of like length together."""
        pad: Any = decoder.tokenizer.pad_token_id
        order = sorted(range(len(targets)), key=lambda i: len(targets[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids, mask = right_padded([targets[i] for i in chosen], pad)
            logps = rebuild_logps(
                decoder.model, vectors[chosen], ids.to(vectors.device), mask.to(vectors.device)
            )
            found |= {i: logps[n, : len(targets[i])] for n, i in enumerate(chosen)}
        return [found[i] for i in range(len(targets))]
