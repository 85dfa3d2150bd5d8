"""transformers' face: the steered CLIP as a `PreTrainedModel`, its loading, the pipeline, the Auto classes."""
