"""What an expert is taught and judged on: data, columns, head, loss and metrics."""
