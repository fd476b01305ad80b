//! The wgpu device. So far: which adapters there are.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// Graphics adapters by name, backend and kind, e.g. `"NVIDIA H100 (vulkan, discrete)"`. Empty without a driver.
pub fn adapters() -> Vec<String> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    // On native platforms the list is ready at the first look.
    let listing = pin!(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    let Poll::Ready(found) = listing.poll(&mut Context::from_waker(Waker::noop())) else {
        return Vec::new();
    };
    let name = |adapter: &wgpu::Adapter| {
        let info = adapter.get_info();
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        };
        format!("{} ({}, {kind})", info.name, info.backend)
    };
    found.iter().map(name).collect()
}
