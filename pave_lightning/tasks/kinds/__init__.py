"""Kinds of task, one file each, found without a list; `texts` and `tokens` hold what some of them share."""
