"""The commands about models of other projects: in, out, and a look at what comes out."""
