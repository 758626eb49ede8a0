"""Every kind of task on models of several families: what runs from fine-tuning to scores, and the page that shows it."""
