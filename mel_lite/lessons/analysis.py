"""Sample the analysis of a pair: step 2 of the method (arXiv 2602.10224)."""

from __future__ import annotations

from collections.abc import Sequence

from mel_lite.engines.base import Completion, Request
from mel_lite.errors import EngineError
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import UnfitPair, analysis_prompt
from mel_lite.seeds import seed_for
from mel_lite.types import Analysis, Pair

Unfit = list[tuple[Pair, str]]
"""Pairs that no lesson can be drawn from, each with the reason."""


def analysis_requests(
    pairs: Sequence[Pair], context: LessonContext, *, batch: int
) -> tuple[list[tuple[Pair, Request]], Unfit]:
    """Return the request for M ~ pi(. | I, x, y+, y-) of every pair, in their order, and the pairs that do not fit.

    `batch` is the number of the generation batch that seeds count from: that of the pair's rollouts.
    """
    fitting: list[tuple[Pair, Request]] = []
    unfit: Unfit = []
    for pair in pairs:
        try:
            context_ids = analysis_prompt(
                pair,
                context.tokenizer,
                context.templates,
                max_context_tokens=context.max_context_tokens,
                mark=context.mark_fork,
                chat_template_kwargs=context.chat_template_kwargs,
            )
        except UnfitPair as reason:
            unfit.append((pair, str(reason)))
            continue
        prompt_hash = pair.group.prompt_hash
        seed = seed_for(context.run_seed, step=batch, prompt_hash=prompt_hash, index=pair.index, purpose="analysis")
        fitting.append((pair, Request(context_ids, seed, context.analysis)))
    return fitting, unfit


def analysis_of(pair: Pair, request: Request, done: Completion, context: LessonContext) -> Analysis:
    """Return the analysis that the engine sampled for a request."""
    templates = context.templates
    return Analysis(
        pair=pair,
        context_ids=request.prompt_ids,
        analysis_ids=done.ids,
        text=templates.analysis_prefill + str(context.tokenizer.decode(list(done.ids), skip_special_tokens=True)),
        finish=done.finish,
        nll_nats=-sum(done.logprobs) / len(done.logprobs) if done.logprobs else float("nan"),
        templates_version=templates.version_of(marked=context.mark_fork),
    )


def write_analyses(pairs: Sequence[Pair], context: LessonContext, *, batch: int) -> tuple[list[Analysis], Unfit]:
    """Sample the analysis of every pair in one `engine.generate` call.

    Returns: the analyses in pair order, and the pairs that no lesson can be drawn from, each with the reason.
    Raises: EngineError when the engine returns another number of completions than were requested.
    """
    fitting, unfit = analysis_requests(pairs, context, batch=batch)
    requests = [request for _, request in fitting]
    completions = context.engine.generate(requests, context.analysis) if requests else []
    if len(completions) != len(requests):
        name = context.engine.name
        raise EngineError(f"engine {name!r} answered {len(completions)} of {len(requests)} analysis requests.")
    both = zip(fitting, completions, strict=True)
    return [analysis_of(pair, request, done, context) for (pair, request), done in both], unfit
