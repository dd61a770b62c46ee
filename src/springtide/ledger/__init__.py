"""What must not be lost: tenants, keys, and what each request used. Knows no prompt, no key, and no HTTP."""
