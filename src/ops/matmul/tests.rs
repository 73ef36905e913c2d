use super::*;
use crate::backend::cpu::{Input, Output, Tier};
use crate::rng::Stream;

/// A tensor of the CPU's.
#[derive(Debug, Clone)]
struct Tensor<T> {
    desc: TensorDesc,
    values: Vec<T>,
}

fn dtype<T: Real>() -> DType {
    if size_of::<T>() == 8 { DType::F64 } else { DType::F32 }
}

/// Random values that are not centred on zero, so that a part that is left out or taken twice shows.
fn tensor<T: Real>(dims: &[usize], index: u64) -> Tensor<T> {
    let (desc, mut stream) = (TensorDesc::new(dims, dtype::<T>()), Stream::new(42, 0, index));
    let values = (0..desc.shape.len()).map(|_| T::of(stream.uniform(-0.7, 1.3))).collect();
    Tensor { desc, values }
}

/// Runs the op on `inputs`, by index so that one tensor may come twice, into a C that holds `before`.
fn run<T: Real>(op: &Matmul, tensors: &[Tensor<T>], inputs: &[usize], before: Option<&[T]>) -> Tensor<T> {
    let descs: Vec<&TensorDesc> = inputs.iter().map(|&i| &tensors[i].desc).collect();
    let desc = op.infer(&descs).unwrap().remove(0);
    let mut values = before.map_or(vec![T::of(f64::NAN); desc.shape.len()], <[T]>::to_vec);
    let mut workspace = vec![T::of(f64::NAN); op.workspace(&descs) / size_of::<T>()];
    let input = |&i: &usize| Input { desc: &tensors[i].desc, bytes: bytemuck::cast_slice(&tensors[i].values) };
    let output = Output { desc: &desc, bytes: bytemuck::cast_slice_mut(&mut values), accumulate: before.is_some() };
    op.cpu(&mut CpuIo {
        inputs: inputs.iter().map(input).collect(),
        outputs: vec![output],
        updates: Vec::new(),
        workspace: bytemuck::cast_slice_mut(&mut workspace),
        tier: Tier::Direct,
    })
    .unwrap();
    Tensor { desc, values }
}

/// The same by plain loops in float64, and the sums of the magnitudes of what is added up.
fn expected<T: Real>(op: &Matmul, tensors: &[Tensor<T>], inputs: &[usize], before: Option<&[T]>) -> Vec<[f64; 2]> {
    let descs: Vec<&TensorDesc> = inputs.iter().map(|&i| &tensors[i].desc).collect();
    let [m, n, k] = op.sizes(&descs).unwrap();
    let values = |index: usize| &tensors[inputs[index]].values[..];
    let element = |factor: Factor, data: &[T], group: usize, [rows, columns]: [usize; 2], [i, j]: [usize; 2]| {
        let first = if factor.shared { 0 } else { group * rows * columns };
        data[first + if factor.transposed { j * rows + i } else { i * columns + j }].to_f64()
    };
    let mut all = Vec::new();
    for place in 0..op.groups * m * n {
        let (group, i, j) = (place / (m * n), place / n % m, place % n);
        let mut terms: Vec<f64> = (0..k)
            .map(|l| element(op.a, values(0), group, [m, k], [i, l]) * element(op.b, values(1), group, [k, n], [l, j]))
            .collect();
        terms.extend(op.bias.then(|| values(2)[group * n + j].to_f64()));
        terms.extend(op.addend.then(|| values(2 + usize::from(op.bias))[place].to_f64()));
        terms.extend(before.map(|before| before[place].to_f64()));
        let sum: f64 = terms.iter().sum();
        all.push([if op.relu { sum.max(0.0) } else { sum }, terms.iter().map(|term| term.abs()).sum()]);
    }
    all
}

fn check<T: Real>(op: Matmul, shapes: &[&[usize]], inputs: &[usize], tolerance: f64) {
    let tensors: Vec<Tensor<T>> = shapes.iter().enumerate().map(|(i, dims)| tensor(dims, i as u64)).collect();
    let before = op.accumulates().then(|| {
        let descs: Vec<&TensorDesc> = inputs.iter().map(|&i| &tensors[i].desc).collect();
        tensor::<T>(op.infer(&descs).unwrap()[0].shape.dims(), 99).values
    });
    for before in [None, before].iter().take(1 + usize::from(op.accumulates())) {
        let got = run(&op, &tensors, inputs, before.as_deref());
        let want = expected(&op, &tensors, inputs, before.as_deref());
        assert_eq!(got.values.len(), want.len());
        for (place, (got, [want, scale])) in got.values.iter().zip(want).enumerate() {
            let error = (got.to_f64() - want).abs();
            assert!(error <= tolerance * scale, "{op:?} {shapes:?} {place}: {got} against {want}");
        }
    }
}

/// Products of every form, of sizes around those of panels, chains, steps and tasks.
fn forms() -> Vec<(Matmul, Vec<Vec<usize>>, Vec<usize>)> {
    let (plain, transposed) = (Factor::PLAIN, Factor::TRANSPOSED);
    let mut forms = Vec::new();
    for (groups, rows, k, n) in [(1, 1, 3, 7), (2, 33, 7, 24), (3, 31, 24, 3), (2, 300, 513, 65), (1, 65, 400, 1030)] {
        let (many, weights) = (vec![groups * rows, k], vec![groups, n, k]);
        let (bias, addend) = (vec![groups, n], vec![groups * rows, n]);
        let folded = Matmul::new(groups, plain, transposed);
        let all = Matmul { bias: true, addend: true, relu: true, ..folded };
        forms.push((folded, vec![many.clone(), weights.clone()], vec![0, 1]));
        forms.push((Matmul { bias: true, ..folded }, vec![many.clone(), weights.clone(), bias.clone()], vec![0, 1, 2]));
        forms.push((all, vec![many.clone(), weights.clone(), bias.clone(), addend.clone()], vec![0, 1, 2, 3]));
        let through = Matmul { relu: true, ..Matmul::new(groups, plain, plain) };
        forms.push((through, vec![many.clone(), vec![groups, k, n]], vec![0, 1]));
        let of_weights = Matmul::new(groups, plain.shared(), plain);
        forms.push((of_weights, vec![vec![rows, 1, 1, k], vec![groups, k, n]], vec![0, 1]));
        // Sums over the rows.
        let gram = Matmul { widened: true, ..Matmul::new(groups, transposed, plain) };
        forms.push((gram, vec![many.clone()], vec![0, 0]));
        forms.push((gram, vec![many.clone(), addend.clone()], vec![0, 1]));
        let with_bias = Matmul { bias: true, relu: true, ..gram };
        forms.push((with_bias, vec![many, addend, bias], vec![0, 1, 2]));
        let shared = Matmul::new(groups, transposed.shared(), plain);
        forms.push((shared, vec![vec![rows, k], vec![groups, rows, n]], vec![0, 1]));
        let both = Matmul::new(groups, transposed, transposed.shared());
        forms.push((both, vec![vec![groups * rows, k], vec![n, rows]], vec![0, 1]));
    }
    // More rows than one part of the sums has, and a Gram matrix of several blocks.
    let gram = Matmul::new(2, transposed, plain);
    forms.push((gram, vec![vec![2 * 25_000, 5]], vec![0, 0]));
    forms.push((gram, vec![vec![2 * 211, 545]], vec![0, 0]));
    forms
}

fn each_form(check: impl Fn(Matmul, &[&[usize]], &[usize])) {
    for (op, shapes, inputs) in forms() {
        check(op, &shapes.iter().map(Vec::as_slice).collect::<Vec<_>>(), &inputs);
    }
}

#[test]
fn every_form_agrees_with_plain_loops() {
    each_form(|op, shapes, inputs| check::<f64>(op, shapes, inputs, 1e-13));
    each_form(|op, shapes, inputs| check::<f32>(op, shapes, inputs, 1e-6));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    each_form(|op, shapes, inputs| {
        let tensors: Vec<Tensor<f32>> = shapes.iter().enumerate().map(|(i, dims)| tensor(dims, i as u64)).collect();
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let c = pool.install(|| run(&op, &tensors, inputs, None));
            c.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        let one = bits(1);
        for threads in 2..=4 {
            assert_eq!(one, bits(threads), "{op:?} {shapes:?}, {threads} threads");
        }
    });
}

#[test]
fn a_gram_matrix_has_the_bits_of_the_product_of_two_copies() {
    for dims in [[2 * 31, 24], [2 * 211, 545], [2 * 1000, 96]] {
        let one: Tensor<f32> = tensor(&dims, 5);
        let op = Matmul::new(2, Factor::TRANSPOSED, Factor::PLAIN);
        let tensors = [one.clone(), one];
        let [gram, product] = [[0, 0], [0, 1]].map(|inputs| run(&op, &tensors, &inputs, None));
        let differ = gram.values.iter().zip(&product.values).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert_eq!(differ, 0, "{dims:?}");
    }
}

#[test]
fn long_sums_keep_their_precision() {
    const K: usize = 200_000;
    let x: Tensor<f32> = tensor(&[K, 3], 1);
    let y: Tensor<f32> = tensor(&[K, 5], 2);
    let op = Matmul::new(1, Factor::TRANSPOSED, Factor::PLAIN);
    let tensors = [x, y];
    for inputs in [[0, 0], [0, 1]] {
        let got = run(&op, &tensors, &inputs, None);
        for (got, [want, scale]) in got.values.iter().zip(expected(&op, &tensors, &inputs, None)) {
            let error = (f64::from(*got) - want).abs() / scale;
            assert!(error < 1e-6, "{inputs:?}: {got} against {want}, {error:e} of the magnitudes");
        }
    }
}

fn refused(op: Matmul, descs: &[TensorDesc]) -> String {
    op.infer(&descs.iter().collect::<Vec<_>>()).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    let (plain, transposed) = (Factor::PLAIN, Factor::TRANSPOSED);
    let f32s = |dims: &[usize]| TensorDesc::new(dims, DType::F32);
    let op = Matmul::new(2, plain, transposed);
    let cases = [
        (Matmul { groups: 0, ..op }, vec![f32s(&[4, 3]), f32s(&[4, 3])], "groups: expected at least 1, got 0"),
        (op, vec![f32s(&[4, 3])], "inputs: expected 2, got 1"),
        (op, vec![f32s(&[5, 3]), f32s(&[4, 3])], "rows of A: expected 2 equal parts, got 5"),
        (op, vec![f32s(&[4, 3]), f32s(&[7, 3])], "rows of B: expected 2 equal parts, got 7"),
        (op, vec![f32s(&[4, 3]), f32s(&[4, 5])], "rows of each B as multiplied: expected 3, got 5"),
        (op, vec![f32s(&[0, 3]), f32s(&[4, 3])], "A: expected a matrix with elements"),
        (op, vec![f32s(&[4, 3]), f32s(&[])], "B: expected a matrix with elements"),
        (op, vec![f32s(&[4, 3]), TensorDesc::new([4, 3], DType::F16)], "element type of B: expected f32, got f16"),
        (op, vec![TensorDesc::new([4, 3], DType::U8); 2], "element type of A: expected a floating-point type, got u8"),
        (
            Matmul { bias: true, ..op },
            vec![f32s(&[4, 3]), f32s(&[10, 3]), f32s(&[5])],
            "bias: expected f32[2, 5], got f32[5]",
        ),
        (
            Matmul { bias: true, addend: true, ..op },
            vec![f32s(&[4, 3]), f32s(&[10, 3]), f32s(&[2, 5]), f32s(&[2, 2, 5])],
            "addend: expected f32[4, 5], got f32[2, 2, 5]",
        ),
    ];
    for (op, descs, expected) in cases {
        let message = refused(op, &descs);
        assert!(message.contains(expected), "{message}: expected {expected}");
    }
}

#[test]
fn the_result_has_the_place_and_type_that_are_documented() {
    let of = |op: Matmul, a: &[usize], b: &[usize], dtype: DType| {
        op.infer(&[&TensorDesc::new(a, dtype), &TensorDesc::new(b, dtype)]).unwrap().remove(0)
    };
    let (plain, transposed) = (Factor::PLAIN, Factor::TRANSPOSED);
    let rows = of(Matmul::new(2, plain, transposed), &[4, 5, 7, 3], &[2, 24, 3], DType::Bf16);
    assert_eq!(rows, TensorDesc::new([4, 5, 7, 24], DType::Bf16));
    let gram = Matmul { widened: true, ..Matmul::new(2, transposed, plain) };
    assert_eq!(of(gram, &[4, 5, 7, 3], &[4, 5, 7, 3], DType::Bf16), TensorDesc::new([2, 3, 3], DType::F32));
    assert_eq!(of(gram, &[4, 3], &[4, 3], DType::F64), TensorDesc::new([2, 3, 3], DType::F64));
    let weights = Matmul::new(3, plain.shared(), plain);
    assert_eq!(of(weights, &[8, 1, 1, 5], &[3, 5, 5], DType::F32), TensorDesc::new([3, 8, 5], DType::F32));
    assert!(gram.accumulates() && Matmul { bias: true, ..gram }.accumulates());
    assert!(!Matmul { relu: true, ..gram }.accumulates() && !Matmul { addend: true, ..gram }.accumulates());
}
