// What becomes of a product's sums: bias, activation, residual, type.
#pragma once

#include "device.cuh"

enum Epilogue {
    STORE = 0,     // out[row][output] = sum + bias, in float
    RESIDUAL = 1,  // out[row][output] += sum + bias, in float
    GELU = 2,      // out[row][output] = gelu(sum + bias), in half
    SWIGLU = 3,    // out[row][i] = swiglu(gate i, up i), in half; the strips hold eight rows of gate, then eight of up
};

struct Output {
    void* values;          // (rows, pitch)
    const float* bias;     // (num_outputs,) of each expert, or null; with SWIGLU that of gate
    const float* up_bias;  // (num_outputs,) of each expert, with SWIGLU
    int pitch;             // values in a row
    int num_outputs;       // of each expert; with SWIGLU of gate
    int epilogue;
};

// tanh form; https://arxiv.org/abs/1606.08415
__device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * x * (1.0f + 0.044715f * x * x)));
}

// OpenAI's variant: both inputs clamped, a sigmoid of 1.702 times the gate, one added to up.
__device__ __forceinline__ float swiglu(float gate, float up) {
    gate = fminf(gate, 7.0f);
    up = fminf(fmaxf(up, -7.0f), 7.0f);
    return gate / (1.0f + __expf(-1.702f * gate)) * (up + 1.0f);
}

template <int EPILOGUE>
__device__ __forceinline__ void finish_one(const Output& out, int row, int output, float sum) {
    if (output >= out.num_outputs) return;
    const size_t index = static_cast<size_t>(row) * out.pitch + output;
    if (EPILOGUE == STORE) static_cast<float*>(out.values)[index] = sum;
    if (EPILOGUE == RESIDUAL) static_cast<float*>(out.values)[index] += sum;
    if (EPILOGUE == GELU) static_cast<__half*>(out.values)[index] = to_half(gelu(sum));
    if (EPILOGUE == SWIGLU) static_cast<__half*>(out.values)[index] = to_half(sum);
}

// Outputs g and g + 8 of strip `strip` in row `row`, from their sums with biases.
template <int EPILOGUE>
__device__ __forceinline__ void finish_sums(const Output& out, int strip, int g, int row, float low, float high) {
    if (EPILOGUE == SWIGLU) {
        finish_one<SWIGLU>(out, row, strip * 8 + g, swiglu(low, high));
    } else {
        finish_one<EPILOGUE>(out, row, strip * 16 + g, low);
        finish_one<EPILOGUE>(out, row, strip * 16 + g + 8, high);
    }
}

// The same from sums without.
template <int EPILOGUE>
__device__ __forceinline__ void finish(const Output& out, int expert, int strip, int g, int row, float low, float high) {
    const size_t offset = static_cast<size_t>(expert) * out.num_outputs;
    const int output = strip * (EPILOGUE == SWIGLU ? 8 : 16) + g;
    if (EPILOGUE == SWIGLU) {
        if (output < out.num_outputs) low += out.bias[offset + output], high += out.up_bias[offset + output];
    } else if (out.bias != nullptr) {
        if (output < out.num_outputs) low += out.bias[offset + output];
        if (output + 8 < out.num_outputs) high += out.bias[offset + output + 8];
    }
    finish_sums<EPILOGUE>(out, strip, g, row, low, high);
}

// The same where the kernel does not know at compile time.
__device__ __forceinline__ void finish(const Output& out, int expert, int strip, int g, int row, float low, float high) {
    if (out.epilogue == STORE) finish<STORE>(out, expert, strip, g, row, low, high);
    if (out.epilogue == RESIDUAL) finish<RESIDUAL>(out, expert, strip, g, row, low, high);
    if (out.epilogue == GELU) finish<GELU>(out, expert, strip, g, row, low, high);
    if (out.epilogue == SWIGLU) finish<SWIGLU>(out, expert, strip, g, row, low, high);
}
