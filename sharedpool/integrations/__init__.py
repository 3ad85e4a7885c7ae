"""What frameworks need beyond the pool itself, a module each; none is imported unless its framework is used."""
