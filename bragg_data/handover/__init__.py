"""Joint refinements for other programs: CIF, GSAS-II, FullProf, TOPAS, and tables."""
