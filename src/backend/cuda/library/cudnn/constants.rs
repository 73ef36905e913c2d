//! The values of cuDNN's enumerations that the engine uses, by the names of its header without `CUDNN_`.

/// Kinds of descriptors.
pub mod descriptor {
    pub const POINTWISE: i32 = 0;
    pub const CONVOLUTION: i32 = 1;
    pub const ENGINE: i32 = 2;
    pub const ENGINECFG: i32 = 3;
    pub const ENGINEHEUR: i32 = 4;
    pub const EXECUTION_PLAN: i32 = 5;
    pub const KNOB_CHOICE: i32 = 7;
    pub const OPERATION_CONVOLUTION_FORWARD: i32 = 10;
    pub const OPERATION_CONVOLUTION_BACKWARD_FILTER: i32 = 11;
    pub const OPERATION_CONVOLUTION_BACKWARD_DATA: i32 = 12;
    pub const OPERATION_POINTWISE: i32 = 13;
    pub const OPERATION_GEN_STATS: i32 = 14;
    pub const OPERATIONGRAPH: i32 = 15;
    pub const VARIANT_PACK: i32 = 16;
    pub const TENSOR: i32 = 17;
    pub const DEVICEPROP: i32 = 38;
}

/// Types of attributes.
pub mod kind {
    pub const HANDLE: i32 = 0;
    pub const DATA_TYPE: i32 = 1;
    pub const BOOLEAN: i32 = 2;
    pub const INT64: i32 = 3;
    pub const FLOAT: i32 = 4;
    pub const VOID_PTR: i32 = 6;
    pub const CONVOLUTION_MODE: i32 = 7;
    pub const HEUR_MODE: i32 = 8;
    pub const KNOB_TYPE: i32 = 9;
    pub const NUMERICAL_NOTE: i32 = 11;
    pub const POINTWISE_MODE: i32 = 14;
    pub const BACKEND_DESCRIPTOR: i32 = 15;
    pub const GENSTATS_MODE: i32 = 16;
    pub const BEHAVIOR_NOTE: i32 = 19;
    pub const INT32: i32 = 23;
    pub const CHAR: i32 = 24;
}

/// Attributes.
pub mod attribute {
    pub const POINTWISE_MODE: i32 = 0;
    pub const POINTWISE_MATH_PREC: i32 = 1;
    pub const CONVOLUTION_COMP_TYPE: i32 = 100;
    pub const CONVOLUTION_CONV_MODE: i32 = 101;
    pub const CONVOLUTION_DILATIONS: i32 = 102;
    pub const CONVOLUTION_FILTER_STRIDES: i32 = 103;
    pub const CONVOLUTION_POST_PADDINGS: i32 = 104;
    pub const CONVOLUTION_PRE_PADDINGS: i32 = 105;
    pub const CONVOLUTION_SPATIAL_DIMS: i32 = 106;
    pub const ENGINEHEUR_MODE: i32 = 200;
    pub const ENGINEHEUR_OPERATION_GRAPH: i32 = 201;
    pub const ENGINEHEUR_RESULTS: i32 = 202;
    pub const ENGINEHEUR_DEVICEPROP: i32 = 204;
    pub const ENGINECFG_ENGINE: i32 = 300;
    pub const ENGINECFG_KNOB_CHOICES: i32 = 302;
    pub const EXECUTION_PLAN_HANDLE: i32 = 400;
    pub const EXECUTION_PLAN_ENGINE_CONFIG: i32 = 401;
    pub const EXECUTION_PLAN_WORKSPACE_SIZE: i32 = 402;
    pub const KNOB_CHOICE_KNOB_TYPE: i32 = 600;
    pub const KNOB_CHOICE_KNOB_VALUE: i32 = 601;
    pub const OPERATION_CONVOLUTION_FORWARD_ALPHA: i32 = 700;
    pub const OPERATION_CONVOLUTION_FORWARD_BETA: i32 = 701;
    pub const OPERATION_CONVOLUTION_FORWARD_CONV_DESC: i32 = 702;
    pub const OPERATION_CONVOLUTION_FORWARD_W: i32 = 703;
    pub const OPERATION_CONVOLUTION_FORWARD_X: i32 = 704;
    pub const OPERATION_CONVOLUTION_FORWARD_Y: i32 = 705;
    pub const OPERATION_CONVOLUTION_BWD_DATA_ALPHA: i32 = 706;
    pub const OPERATION_CONVOLUTION_BWD_DATA_BETA: i32 = 707;
    pub const OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC: i32 = 708;
    pub const OPERATION_CONVOLUTION_BWD_DATA_W: i32 = 709;
    pub const OPERATION_CONVOLUTION_BWD_DATA_DX: i32 = 710;
    pub const OPERATION_CONVOLUTION_BWD_DATA_DY: i32 = 711;
    pub const OPERATION_CONVOLUTION_BWD_FILTER_ALPHA: i32 = 712;
    pub const OPERATION_CONVOLUTION_BWD_FILTER_BETA: i32 = 713;
    pub const OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC: i32 = 714;
    pub const OPERATION_CONVOLUTION_BWD_FILTER_DW: i32 = 715;
    pub const OPERATION_CONVOLUTION_BWD_FILTER_X: i32 = 716;
    pub const OPERATION_CONVOLUTION_BWD_FILTER_DY: i32 = 717;
    pub const OPERATION_POINTWISE_PW_DESCRIPTOR: i32 = 750;
    pub const OPERATION_POINTWISE_XDESC: i32 = 751;
    pub const OPERATION_POINTWISE_BDESC: i32 = 752;
    pub const OPERATION_POINTWISE_YDESC: i32 = 753;
    pub const OPERATION_GENSTATS_MODE: i32 = 770;
    pub const OPERATION_GENSTATS_MATH_PREC: i32 = 771;
    pub const OPERATION_GENSTATS_XDESC: i32 = 772;
    pub const OPERATION_GENSTATS_SUMDESC: i32 = 773;
    pub const OPERATION_GENSTATS_SQSUMDESC: i32 = 774;
    pub const OPERATIONGRAPH_HANDLE: i32 = 800;
    pub const OPERATIONGRAPH_OPS: i32 = 801;
    pub const TENSOR_BYTE_ALIGNMENT: i32 = 900;
    pub const TENSOR_DATA_TYPE: i32 = 901;
    pub const TENSOR_DIMENSIONS: i32 = 902;
    pub const TENSOR_STRIDES: i32 = 903;
    pub const TENSOR_UNIQUE_ID: i32 = 906;
    pub const TENSOR_IS_VIRTUAL: i32 = 907;
    pub const VARIANT_PACK_UNIQUE_IDS: i32 = 1000;
    pub const VARIANT_PACK_DATA_POINTERS: i32 = 1001;
    pub const VARIANT_PACK_WORKSPACE: i32 = 1003;
    pub const ENGINE_GLOBAL_INDEX: i32 = 1301;
    pub const ENGINE_NUMERICAL_NOTE: i32 = 1303;
    pub const ENGINE_BEHAVIOR_NOTE: i32 = 1305;
    pub const DEVICEPROP_DEVICE_ID: i32 = 2700;
    pub const DEVICEPROP_JSON_REPRESENTATION: i32 = 2702;
}

/// Element types.
pub mod data {
    pub const FLOAT: i32 = 0;
    pub const HALF: i32 = 2;
    pub const BFLOAT16: i32 = 9;
}

/// What cuDNN says of an engine's numbers.
pub mod numerical_note {
    pub const TENSOR_CORE: i32 = 0;
    pub const DOWN_CONVERT_INPUTS: i32 = 1;
    pub const REDUCED_PRECISION_REDUCTION: i32 = 2;
    pub const FFT: i32 = 3;
    pub const NONDETERMINISTIC: i32 = 4;
    pub const WINOGRAD: i32 = 5;
}

/// How engines are ranked.
pub mod heuristics {
    pub const MODE_B: i32 = 1;
    pub const MODE_FALLBACK: i32 = 2;
    pub const MODE_A: i32 = 3;
}

/// An engine that is compiled when its plan is made.
pub const BEHAVIOR_NOTE_RUNTIME_COMPILATION: i32 = 0;
/// No flip of the kernel.
pub const CROSS_CORRELATION: i32 = 1;
pub const POINTWISE_ADD: i32 = 0;
pub const GENSTATS_SUM_SQSUM: i32 = 0;
