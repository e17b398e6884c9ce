"""Makes data sets that training takes as they are: of any pile of photographs, of PASCAL VOC, SBD and COCO."""
