"""Mode auto: times steps at start-up, keeps the times in a table, picks the plan of each step."""
