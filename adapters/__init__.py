"""Model families, one per file: a subclass of `tokenprune.adapters.base.Adapter` registers."""
