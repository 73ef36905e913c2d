use super::*;

functions! {
    /// What reads descriptors back.
    Readers {
        fn cublasLtMatmulDescGetAttribute(Opaque, i32, *mut c_void, usize, *mut usize) -> i32;
        fn cublasLtMatrixLayoutGetAttribute(Opaque, i32, *mut c_void, usize, *mut usize) -> i32;
        fn cublasLtMatmulPreferenceGetAttribute(Opaque, i32, *mut c_void, usize, *mut usize) -> i32;
    }
}

fn product(m: usize, n: usize, k: usize, a_transposed: bool, b_transposed: bool) -> Product {
    Product { bias: true, ..Product::new([m, n, k], [a_transposed, b_transposed], DType::Bf16, DType::F32) }
}

/// What cuBLASLt computes: columns one after the other.
fn column_major_product(matrices: [Matrix; 3], first: &[f64], second: &[f64]) -> Vec<f64> {
    let at = |matrix: Matrix, values: &[f64], row: usize, column: usize| match matrix.transposed {
        false => values[column * matrix.rows + row],
        true => values[row * matrix.rows + column],
    };
    let [a, b, c] = matrices;
    let inner = if a.transposed { a.rows } else { a.columns };
    assert_eq!(inner, if b.transposed { b.columns } else { b.rows });
    let mut out = vec![f64::NAN; c.rows * c.columns];
    for column in 0..c.columns {
        for row in 0..c.rows {
            let sum = (0..inner).map(|i| at(a, first, row, i) * at(b, second, i, column)).sum();
            out[column * c.rows + row] = sum;
        }
    }
    out
}

#[test]
fn row_major_products_are_column_major_ones_with_operands_exchanged() {
    let (m, n, k) = (3, 5, 4);
    let a: Vec<f64> = (0..m * k).map(|i| (i * i) as f64 - 7.0).collect();
    let b: Vec<f64> = (0..k * n).map(|i| 3.0 * i as f64 - 11.0).collect();
    let transpose = |values: &[f64], rows: usize, columns: usize| -> Vec<f64> {
        (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
    };
    let mut expected = vec![0.0; m * n];
    for (i, out) in expected.iter_mut().enumerate() {
        *out = (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum();
    }
    for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
        let stored_a = if a_transposed { transpose(&a, m, k) } else { a.clone() };
        let stored_b = if b_transposed { transpose(&b, k, n) } else { b.clone() };
        let matrices = column_major(&product(m, n, k, a_transposed, b_transposed));
        let got = column_major_product(matrices, &stored_b, &stored_a);
        assert_eq!(got, expected, "A transposed: {a_transposed}, B transposed: {b_transposed}");
    }
}

#[test]
fn ranked_results_have_the_header_s_layout() {
    assert_eq!((size_of::<Ranked>(), size_of::<Algorithm>()), (96, 64));
    assert_eq!(std::mem::offset_of!(Ranked, status), 72);
}

/// Descriptors are plain host memory: what was said is read back from the library itself, without a device.
#[test]
fn the_library_has_understood_the_descriptors() {
    let library = match CublasLt::load() {
        Ok(library) => library,
        Err(error) => {
            assert!(std::env::var("SIMSIAM_REQUIRE_CUDNN").is_err(), "{error}");
            return println!("skipped: {error}");
        }
    };
    let functions = Readers::load(search::find(Library::CublasLt).unwrap().library, "cuBLASLt").unwrap();
    let described = Described::new(&library, &product(30, 50, 70, true, false), Calls::One, true).unwrap();
    let attribute = |get: unsafe extern "C" fn(Opaque, i32, *mut c_void, usize, *mut usize) -> i32,
                     raw: Opaque,
                     attribute: i32,
                     size: usize|
     -> u64 {
        let (mut value, mut written) = (0u64, 0);
        // SAFETY: at most eight bytes are written.
        let status = unsafe { get(raw, attribute, (&raw mut value).cast(), size, &mut written) };
        assert_eq!((status, written), (0, size), "attribute {attribute}");
        value
    };
    let operation = |which| attribute(functions.cublasLtMatmulDescGetAttribute, described.operation.raw, which, 4);
    // Compute type (of bf16 data TF32 is no question), scale type, pointer mode, transposed operands, epilogue.
    assert_eq!([0, 1, 2, 3, 4, 7].map(operation), [CUBLAS_COMPUTE_32F as u64, 0, 0, 0, 1, EPILOGUE_BIAS as u64]);
    let layout = |which: usize| {
        let raw = described.layouts[which].raw;
        let of = |name, size| attribute(functions.cublasLtMatrixLayoutGetAttribute, raw, name, size);
        // Type, order, rows, columns, leading dimension.
        [of(0, 4), of(1, 4), of(2, 8), of(3, 8), of(4, 8)]
    };
    assert_eq!(layout(0), [CUDA_R_16BF as u64, 0, 50, 70, 50]);
    assert_eq!(layout(1), [CUDA_R_16BF as u64, 0, 30, 70, 30]);
    assert_eq!(layout(2), [CUDA_R_32F as u64, 0, 50, 30, 50]);
    let preferences = preferences(&library, &product(30, 50, 70, true, false)).unwrap();
    let preference =
        |which, size| attribute(functions.cublasLtMatmulPreferenceGetAttribute, preferences.raw, which, size);
    assert_eq!([preference(1, 8), preference(3, 4)], [SCRATCH as u64, 2]);
    assert_eq!([5, 6, 7, 8].map(|which| preference(which, 4)), [64; 4]);
    let tf32 = Product { dtype: DType::F32, ..product(2, 3, 4, false, false) };
    let compute = |tf32_allowed| {
        let described = Described::new(&library, &tf32, Calls::One, tf32_allowed).unwrap();
        attribute(functions.cublasLtMatmulDescGetAttribute, described.operation.raw, 0, 4)
    };
    assert_eq!([false, true].map(compute), [68, 77]);
}

#[test]
fn what_it_cannot_multiply_is_refused_by_name() {
    let error = data_type(DType::F64).unwrap_err().to_string();
    assert!(error.contains("expected f32, bf16 or f16, got f64"), "{error}");
}
