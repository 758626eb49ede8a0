"""Task experts: fine-tuned with Lightning, or loaded from where they are."""
