"""A multimodal model taken apart for a nested pipeline: roles, stages, items, microbatches."""
