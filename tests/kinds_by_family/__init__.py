"""Every kind of task on models of several families: what runs from fine-tuning to scores, and a page that shows it."""
