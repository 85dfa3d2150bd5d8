"""What happens to the rows of a batch: steps, scores of label sets, the corpus of VS2++."""
