"""From scores to numbers, and the numbers as JSON, tables, a page, and a part of the eraser's header."""
