//! Instruction sets behind one vector trait, chosen at run time.
