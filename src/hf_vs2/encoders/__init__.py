"""What a CLIP is to this package: its vision tower, what comes after it, its tokenizer and image processor, its
identity."""
