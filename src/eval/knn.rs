//! knn
