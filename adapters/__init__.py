"""Model families, one per file: a subclass of `tokenprune.adapter.Adapter` registers itself."""
