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

/// The library, and what reads its descriptors back; none where it is not installed and need not be.
fn loaded() -> Option<(Arc<CublasLt>, Readers)> {
    match CublasLt::load() {
        Ok(library) => {
            let readers = Readers::load(search::find(Library::CublasLt).unwrap().library, "cuBLASLt").unwrap();
            Some((library, readers))
        }
        Err(error) => {
            assert!(std::env::var("SIMSIAM_REQUIRE_CUDNN").is_err(), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// The `size` bytes of an attribute, as a number.
fn attribute(
    get: unsafe extern "C" fn(Opaque, i32, *mut c_void, usize, *mut usize) -> i32,
    of: &Owned,
    attribute: i32,
    size: usize,
) -> u64 {
    let (mut value, mut written) = (0u64, 0);
    // SAFETY: at most eight bytes are written.
    let status = unsafe { get(of.raw, attribute, (&raw mut value).cast(), size, &mut written) };
    assert_eq!((status, written), (0, size), "attribute {attribute}");
    value
}

/// Descriptors are plain host memory: what was said is read back from the library itself, without a device.
#[test]
fn the_library_has_understood_the_descriptors() {
    let Some((library, readers)) = loaded() else { return };
    let described = Described::new(&library, &product(30, 50, 70, true, false), Calls::One, true).unwrap();
    let operation = |which| attribute(readers.cublasLtMatmulDescGetAttribute, &described.operation, which, 4);
    // Compute type (of bf16 data TF32 is no question), scale type, pointer mode, transposed operands, epilogue.
    assert_eq!([0, 1, 2, 3, 4, 7].map(operation), [CUBLAS_COMPUTE_32F as u64, 0, 0, 0, 1, EPILOGUE_BIAS as u64]);
    let layout = |which: usize| {
        let of =
            |name, size| attribute(readers.cublasLtMatrixLayoutGetAttribute, &described.layouts[which], name, size);
        // Type, order, rows, columns, leading dimension.
        [of(0, 4), of(1, 4), of(2, 8), of(3, 8), of(4, 8)]
    };
    assert_eq!(layout(0), [CUDA_R_16BF as u64, 0, 50, 70, 50]);
    assert_eq!(layout(1), [CUDA_R_16BF as u64, 0, 30, 70, 30]);
    assert_eq!(layout(2), [CUDA_R_32F as u64, 0, 50, 30, 50]);
    let preferences = preferences(&library, &product(30, 50, 70, true, false)).unwrap();
    let preference = |which, size| attribute(readers.cublasLtMatmulPreferenceGetAttribute, &preferences, which, size);
    assert_eq!([preference(1, 8), preference(3, 4)], [SCRATCH as u64, 2]);
    assert_eq!([5, 6, 7, 8].map(|which| preference(which, 4)), [64; 4]);
}

#[test]
fn tf32_is_for_float32_that_need_not_be_exact() {
    let Some((library, readers)) = loaded() else { return };
    let compute = |product: Product, tf32| {
        let described = Described::new(&library, &product, Calls::One, tf32).unwrap();
        attribute(readers.cublasLtMatmulDescGetAttribute, &described.operation, 0, 4)
    };
    let plain = Product { dtype: DType::F32, ..product(2, 3, 4, false, false) };
    assert_eq!([false, true].map(|tf32| compute(plain, tf32)), [68, 77]);
    assert_eq!([false, true].map(|tf32| compute(Product { exact: true, ..plain }, tf32)), [68, 68]);
}

#[test]
fn groups_are_strided_batches_and_their_biases_too() {
    let Some((library, readers)) = loaded() else { return };
    let (bf16, shared) = (DType::Bf16, [true, false]);
    let three =
        Product { groups: 3, shared, bias: true, relu: true, ..Product::new([5, 7, 9], [false; 2], bf16, bf16) };
    let epilogues = [(false, false, 1), (false, true, 2), (true, false, 4), (true, true, 6)];
    for (calls, groups) in [(Calls::One, 3), (Calls::Each, 1)] {
        let described = Described::new(&library, &three, calls, false).unwrap();
        let operation =
            |which, size| attribute(readers.cublasLtMatmulDescGetAttribute, &described.operation, which, size);
        // Epilogue, the address that stands for that of the bias, which three times 7 elements lie at, and its stride.
        let stride = if groups > 1 { 7 } else { 0 };
        assert_eq!([operation(7, 4), operation(8, 8), operation(10, 8)], [6, 2, stride], "{calls:?}");
        let batch = |which: usize| {
            let of =
                |name, size| attribute(readers.cublasLtMatrixLayoutGetAttribute, &described.layouts[which], name, size);
            [of(5, 4), of(6, 8)]
        };
        // B, A (which is shared) and C.
        let strides = if groups > 1 { [63, 0, 35] } else { [0; 3] };
        assert_eq!([0, 1, 2].map(batch), strides.map(|stride| [groups, stride]), "{calls:?}");
    }
    for (bias, relu, expected) in epilogues {
        let described = Described::new(&library, &Product { bias, relu, ..three }, Calls::Each, false).unwrap();
        assert_eq!(attribute(readers.cublasLtMatmulDescGetAttribute, &described.operation, 7, 4), expected);
    }
    // B lies at multiples of 63, A but once, C at multiples of 35 elements.
    let preferences = preferences(&library, &three).unwrap();
    let aligned = |which| attribute(readers.cublasLtMatmulPreferenceGetAttribute, &preferences, which, 4);
    assert_eq!([5, 6, 7, 8].map(aligned), [2, 64, 2, 2]);
}

#[test]
fn what_groups_are_aligned_to_follows_from_their_distance() {
    let aligned =
        [(1, 6), (2, 0), (2, 6), (2, 24), (3, 64), (2, 4096 + 32)].map(|(groups, stride)| alignment(groups, stride));
    assert_eq!(aligned, [64, 64, 2, 8, 64, 32]);
}

#[test]
fn a_group_s_tensors_lie_behind_those_of_the_groups_before() {
    let (bf16, f32, shared) = (DType::Bf16, DType::F32, [false, true]);
    let product = Product { groups: 3, shared, bias: true, ..Product::new([5, 7, 9], [true, false], bf16, f32) };
    let [a, b, c, bias, workspace] = [1 << 12, 2 << 12, 3 << 12, 4 << 12, 5 << 12].map(DevicePtr);
    let pointers = Pointers { a, b, c, bias, addend: DevicePtr::NULL, workspace };
    let Pointers { a, b, c, bias, addend, workspace } = pointers.of_group(&product, 2);
    assert_eq!([a.0, b.0, c.0], [(1 << 12) + 2 * 45 * 2, 2 << 12, (3 << 12) + 2 * 35 * 4]);
    assert_eq!([bias.0, addend.0, workspace.0], [(4 << 12) + 2 * 7 * 4, 0, 5 << 12]);
    let added = DevicePtr(7 << 12);
    let with_addend = Pointers { addend: added, ..pointers }.of_group(&product, 1);
    assert_eq!(with_addend.addend.0, added.0 + 35 * 4);
    // What is added comes in this order, whichever there is.
    let two = [DevicePtr(8), DevicePtr(9)];
    assert_eq!(Product { addend: true, ..product }.added(two), two);
    assert_eq!(Product { bias: false, addend: true, ..product }.added(two), [DevicePtr::NULL, two[0]]);
    assert_eq!(Product { bias: false, ..product }.added(two), [DevicePtr::NULL; 2]);
}

#[test]
fn what_it_cannot_multiply_is_refused_by_name() {
    let error = data_type(DType::F64).unwrap_err().to_string();
    assert!(error.contains("expected f32, bf16 or f16, got f64"), "{error}");
}
