"""What is read: corpora, queries, and the batches made from them."""
