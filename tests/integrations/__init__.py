"""With other people's programs, which `make test-integrations` installs; skipped with the reason elsewhere."""
