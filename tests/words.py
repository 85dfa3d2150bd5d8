"""A tokenizer of whole words, and a model to compare methods with."""

import torch
from conftest import make_tiny_clip
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_vs2.clip.modeling import VS2CLIPForZeroShot
from hf_vs2.config.sae import SAEConfig
from hf_vs2.data.labels.prompts import (
    ENSEMBLE_TEMPLATES,
    SINGLE_TEMPLATE,
)
from hf_vs2.sae.modeling import SAEModel
from hf_vs2.training.domain import measure_statistics


NAMES = ["dog", "night bird", "red", "frog", "ship", "cat", "deer"]


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, laid out for the text tower of the `tiny_clip` fixture (99 tokens, end 98, padding 1)."""
    words = {word for text in (*SINGLE_TEMPLATE, *ENSEMBLE_TEMPLATES, *NAMES) for word in _words(text)}
    vocabulary = {"<s>": 0, "<pad>": 1, "<unk>": 2, "</s>": 98} | {word: 3 + i for i, word in enumerate(sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 98)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.replace("{}", ""))]


LEVELS = (0.5, 0.9, 0.99)


@torch.no_grad()
def compared_model(
    rows: torch.Tensor, calibrated: bool = True, statistics: bool = False, **settings
) -> VS2CLIPForZeroShot:
    torch.manual_seed(1)
    sae = SAEModel(SAEConfig(hidden_size=32, expansion_factor=2, top_k=8)).eval()
    sae.set_statistics(rows.mean(0), (rows - rows.mean(0)).square().sum(-1).mean())
    if calibrated:
        fvu = sae(rows).fvu
        sae.config.fvu_quantiles = {str(level): float(fvu.quantile(level)) for level in LEVELS}
    if statistics:
        sae.set_domain_statistics(measure_statistics(sae, rows, torch.arange(40), torch.arange(40, len(rows))))
    return VS2CLIPForZeroShot(make_tiny_clip(), sae, **settings)
