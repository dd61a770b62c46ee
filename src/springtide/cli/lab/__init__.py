"""What benchmarks and tests of a whole fleet share: real processes on this machine, what is done to them, clients that
notice every lost token, and the judgement over it all."""
